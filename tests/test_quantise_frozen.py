"""The FP8 pass over language models and a ViT: what it replaces, what it leaves and why, and what comes out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    Blip2VisionConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from vpgtrans.engine.models.vision import eva_vit
from vpgtrans.kernels.frozen_norm import Norm
from vpgtrans.kernels.quantise_frozen import FrozenLinear, FrozenNorm, QuantiseError, quantise_frozen_, rows_of

COMMON = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.tensor([[3, 5, 7, 11, 13], [2, 4, 6, 8, 10]])


def spread(model: nn.Module, dtype=torch.bfloat16) -> nn.Module:
    """Frozen, with weights at which every part matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1 + 0.2 * drawn)
    return model.requires_grad_(False).eval().to(dtype)


def llama(**more):
    sizes = COMMON | {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2} | more
    return spread(LlamaForCausalLM(LlamaConfig(**sizes)))


def opt():
    sizes = COMMON | {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 64}
    return spread(OPTForCausalLM(OPTConfig(**sizes)))


def gemma_2():
    sizes = COMMON | {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}
    return spread(Gemma2ForCausalLM(Gemma2Config(**sizes)))


def t5():
    sizes = {
        "vocab_size": 64,
        "d_model": 64,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
        "d_kv": 16,
        "decoder_start_token_id": 0,
    }
    model = spread(T5ForConditionalGeneration(T5Config(feed_forward_proj="gated-gelu", **sizes)))
    for name, module in model.named_modules():
        if name.endswith("Attention.q"):
            module.weight.mul_(16**-0.5)  # T5 does not scale its scores, its initial weights do
    return model


def vit():
    return spread(
        eva_vit(
            Blip2VisionConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=32,
                patch_size=16,
            )
        )
    )


def forward(model, inputs=None):
    if not hasattr(model, "get_input_embeddings"):
        return model(torch.linspace(-2, 2, 2 * 3 * 32 * 32).view(2, 3, 32, 32).bfloat16())
    embeds = model.get_input_embeddings()(IDS) if inputs is None else inputs
    if model.config.is_encoder_decoder:
        return model(inputs_embeds=embeds, decoder_input_ids=IDS[:, :3]).logits
    return model(inputs_embeds=embeds).logits


@pytest.mark.parametrize(
    "make, linears, norms, left",
    [
        (llama, 14, 4, ["lm_head"]),
        (opt, 12, 4, ["lm_head"]),
        (gemma_2, 14, 0, ["lm_head"]),
        (t5, 36, 11, ["lm_head"]),
        (vit, 8, 4, []),
    ],
)
def test_pass(make, linears, norms, left):
    """Gemma's norm multiplies by 1 + weight, which is not our formula, so it stays."""
    model = make()
    with torch.no_grad():
        before = forward(model).float()
        report = quantise_frozen_(model, run=lambda: forward(model))
        after = forward(model).float()
    assert (len(report.linears), len(report.norms), list(report.left)) == (linears, norms, left)
    assert sum(isinstance(m, FrozenLinear) for m in model.modules()) == linears
    assert sum(isinstance(m, FrozenNorm) for m in model.modules()) == norms
    assert report.bytes_before < report.bytes_after < 1.1 * report.bytes_before  # equal but for the scales
    assert f"{linears} linears and {norms} norms" in report.lines()[0]
    error = ((after - before).norm() / before.norm()).item()
    assert 1e-3 < error < 0.25, error  # some 4 % a layer, over eight in a row
    assert torch.nn.functional.cosine_similarity(after, before, dim=-1).min() > 0.95


@pytest.mark.parametrize("make", [llama, t5])
def test_the_input_gradient_flows_and_is_near(make):
    model = make()
    embeds = model.get_input_embeddings()(IDS).detach()
    direction = torch.randn(forward(model).shape, generator=torch.Generator().manual_seed(1)).bfloat16()

    def gradient():
        leaf = embeds.clone().requires_grad_()
        forward(model, leaf).backward(direction)
        return leaf.grad.float()

    before = gradient()
    quantise_frozen_(model, run=lambda: forward(model))
    after = gradient()
    assert torch.nn.functional.cosine_similarity(after.flatten(), before.flatten(), dim=0) > 0.95
    assert 1e-3 < ((after - before).norm() / before.norm()).item() < 0.35
    assert all(p.grad is None for p in model.parameters())


def test_a_norm_quantises_once_for_all_who_take_it(monkeypatch):
    model = llama()
    quantise_frozen_(model, run=lambda: forward(model))
    seen = []
    monkeypatch.setattr(
        "vpgtrans.kernels.quantise_frozen.rows_of", lambda x: seen.append(rows_of(x) is not None) or rows_of(x)
    )
    fused = forward(model)
    assert seen == [True, True, True, False, True, True, False] * 2  # q, k, v, o, gate, up, down
    plain = llama()
    quantise_frozen_(plain)
    assert not any(isinstance(m, FrozenNorm) for m in plain.modules())
    assert (fused - forward(plain)).abs().max() <= 2**-6 * fused.abs().max()  # roundings of the norm itself


def test_rows_that_were_written_to_are_not_used():
    norm = FrozenNorm(spread(nn.LayerNorm(16)), Norm("layer", 1e-5))
    y = norm(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).bfloat16())
    assert rows_of(y) is not None and rows_of(y + 0) is None
    y.mul_(2)
    assert rows_of(y) is None


def test_what_is_left():
    block = nn.ModuleDict(
        {
            "taken": nn.Linear(16, 32), "kept": nn.Linear(16, 32), "trains": nn.Linear(16, 32), "narrow": nn.Linear(16, 24),
            "tied": nn.Linear(16, 32), "other": nn.Linear(16, 32), "quantisable": nn.modules.linear.NonDynamicallyQuantizableLinear(16, 16),
        }
    )  # fmt: skip
    block.requires_grad_(False)
    block["trains"].requires_grad_(True)
    block["other"].weight = block["tied"].weight
    report = quantise_frozen_(block, keep=[block["kept"]])
    assert report.linears == ["taken"]
    assert report.left == {
        "kept": "asked for", "trains": "it trains", "narrow": "a side is no multiple of 16", "tied": "its weight is shared with another module",
        "other": "its weight is shared with another module", "quantisable": "a NonDynamicallyQuantizableLinear",
    }  # fmt: skip
    assert list(block["taken"].parameters()) == []
    with pytest.raises(QuantiseError, match=r"found none: it trains"):
        quantise_frozen_(nn.Sequential(nn.Linear(16, 16)))
    with pytest.raises(QuantiseError, match=r"has no nn.Linear"):
        quantise_frozen_(nn.Sequential(nn.ReLU()))


def test_a_tied_head_stays_with_its_embedding():
    model = llama(tie_word_embeddings=True)
    quantise_frozen_(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_device_without_fp8_changes_nothing(monkeypatch):
    monkeypatch.setattr(
        "vpgtrans.kernels.quantise_frozen.fp8_unsupported_reason", lambda device: "compute capability 8.0"
    )
    block = nn.Sequential(nn.Linear(16, 16)).requires_grad_(False)
    with pytest.raises(QuantiseError, match=r"compute capability 8.0; leave the model in bf16"):
        quantise_frozen_(block)
    assert type(block[0]) is nn.Linear


def test_moving_and_casting_keep_fp8():
    linear = nn.Linear(32, 16).requires_grad_(False)
    fixed = FrozenLinear(linear)
    wanted = fixed(torch.ones(2, 32))
    fixed.to(torch.bfloat16)
    assert fixed.weight_by_output.dtype == torch.float8_e4m3fn and fixed.weight_output_scales.dtype == torch.float32
    assert torch.allclose(fixed(torch.ones(2, 32)), wanted, atol=2e-2)
    assert fixed.weight.shape == (16, 32) and fixed.weight.is_meta and "e4m3" in repr(fixed)
    assert FrozenLinear(linear).to("meta").weight_by_input.is_meta
    stored = fixed.state_dict()
    again = FrozenLinear(nn.Linear(32, 16).requires_grad_(False))
    again.load_state_dict(stored)
    assert torch.equal(again.to(torch.bfloat16)(torch.ones(2, 32)), fixed(torch.ones(2, 32)))
