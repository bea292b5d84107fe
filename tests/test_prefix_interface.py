"""Prefix attention inside language models: the segments that packing makes, and what comes out of transformers' attention interface."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vpgtrans.engine.data.packing import CaptionData, Group, pack_update
from vpgtrans.engine.models import attention
from vpgtrans.engine.models.attention import PREFIX, register_prefix_attention
from vpgtrans.engine.models.causal import CausalLanguageModel
from vpgtrans.kernels.checks import assert_within_budget
from vpgtrans.kernels.prefix_attention import dense_mask

QUERIES = 3
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = ["llama", "opt", "qwen3", "mistral"]


def language_model(family, make_llm, tokenizer) -> CausalLanguageModel:
    """Tiny, with random weights that make attention far from uniform."""
    if family in ("llama", "opt"):
        return make_llm(family)
    kinds = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
        "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 128}),
        "gemma2": (Gemma2Config, Gemma2ForCausalLM, {}),
    }
    config, model, more = kinds[family]
    torch.manual_seed(0)
    attending = "eager" if family == "gemma2" else "sdpa"
    settings = config(vocab_size=len(tokenizer), attn_implementation=attending, **SIZES, **more)
    made = model(settings)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return CausalLanguageModel(made, tokenizer, f"tiny-{family}")


def packed(llm):
    """Five captions of two images in rows of 20: the first image's group is split over two rows."""
    rng = np.random.default_rng(0)
    counts = [3, 2]
    ids = [
        [[llm.special.bos, *rng.integers(3, 20, rng.integers(2, 6)).tolist(), llm.special.newline] for _ in range(n)]
        for n in counts
    ]
    groups = [Group(i, 0, tuple(range(n))) for i, n in enumerate(counts)]
    (batch,) = pack_update(groups, CaptionData("x", [None] * 2, ids), QUERIES, 20, 4, 0)
    assert len(batch.visual_source) > 2 * QUERIES
    return batch


def loss_and_gradient(llm, batch, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(2, QUERIES, llm.hidden_width, generator=generator).to(dtype).requires_grad_()
    loss = llm.loss_sum(prompts, batch)
    loss.backward()
    return loss.detach(), prompts.grad


def test_segments_by_hand():
    """Two captions behind one picture, then another picture, then padding: prefix start and stop, caption start, one past the last that sees it."""
    data = CaptionData("x", [None] * 2, [[[1, 5, 6], [1, 4]], [[1, 3]]])
    (batch,) = pack_update([Group(0, 0, (0, 1)), Group(1, 0, (0,))], data, 2, 14, 1, 0, fixed_shape=True)
    assert batch.segments.dtype == torch.int32
    assert batch.segments.tolist() == [
        [[0, 2, 2, 7]] * 2
        + [[0, 2, 2, 5]] * 3
        + [[0, 2, 5, 7]] * 2
        + [[7, 9, 9, 11]] * 2
        + [[7, 9, 9, 11]] * 2
        + [[11, 14, 14, 14]] * 3
    ]


def test_the_last_query_that_sees_a_key(make_llm):
    """The fourth number, by which key gradients know where to stop, agrees with the mask that the first three give."""
    batch = packed(make_llm("llama"))
    mask = dense_mask(batch.segments)[:, 0].numpy()
    assert (batch.segments[..., 3].numpy() == mask.shape[1] - mask[:, ::-1].argmax(1)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_path_equals_sdpa(family, make_llm, word_tokenizer, monkeypatch):
    """On the CPU, without the interpreter, loss and gradients are today's to the last bit."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    llm = language_model(family, make_llm, word_tokenizer)
    batch = packed(llm)
    expected = loss_and_gradient(llm, batch)
    llm.use_prefix_attention()
    assert llm.model.config._attn_implementation == PREFIX
    for got, wanted in zip(loss_and_gradient(llm, batch), expected, strict=True):
        assert torch.equal(got, wanted)
    llm.check_contract()


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_the_kernels_inside_a_model(family, make_llm, word_tokenizer, monkeypatch):
    """Loss and gradients against float64, no worse than twice what sdpa with a dense mask does."""
    llm = language_model(family, make_llm, word_tokenizer)
    batch = packed(llm)
    plain = loss_and_gradient(llm, batch)
    llm.model.double()
    exact = loss_and_gradient(llm, batch, torch.float64)
    llm.model.float()
    llm.use_prefix_attention()
    calls = []
    real = attention.prefix_attention
    monkeypatch.setattr(attention, "prefix_attention", lambda *a, **k: calls.append(1) or real(*a, **k))
    got = loss_and_gradient(llm, batch)
    assert len(calls) == 2  # one a layer
    for name, *values in zip(("loss", "gradient"), got, exact, plain, strict=True):
        assert_within_budget(name, *values)


def test_other_masks_attend_as_before(make_llm):
    """Padded and plain forwards, and generation, are sdpa's."""
    llm = make_llm("llama")
    ids = torch.tensor([[3, 4, 5, 6], [0, 0, 3, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])

    def run():
        made = llm.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
        return llm.model(input_ids=ids, attention_mask=mask).logits, llm.model(input_ids=ids).logits, made

    expected = run()
    llm.use_prefix_attention()
    for got, wanted in zip(run(), expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_short_sliding_window_is_left_to_sdpa(make_llm, word_tokenizer, caplog):
    llm = language_model("mistral", make_llm, word_tokenizer)
    batch = packed(llm)
    expected = loss_and_gradient(llm, batch)
    llm.use_prefix_attention()
    for layer in llm.model.model.layers:
        layer.self_attn.config.sliding_window = 7
    for got, wanted in zip(loss_and_gradient(llm, batch), expected, strict=True):
        assert torch.equal(got, wanted)
    assert "sliding_window 7 is shorter than the row of" in caplog.text


def test_soft_capped_scores_are_refused(make_llm, word_tokenizer):
    llm = language_model("gemma2", make_llm, word_tokenizer)
    assert "attends by eager" in llm.prefix_attention_unsupported_reason(torch.device("cpu"))
    register_prefix_attention()
    llm.model.set_attn_implementation(PREFIX)
    with pytest.raises(ValueError, match="softcap"):
        loss_and_gradient(llm, packed(llm))


def test_autocast_reaches_the_kernels(make_llm):
    """Rotated queries come in float32 where the model's weights are; values in bfloat16."""
    llm = make_llm("llama")
    batch = packed(llm)
    with torch.autocast("cpu", torch.bfloat16):
        plain, _ = loss_and_gradient(llm, batch)
        llm.use_prefix_attention()
        got, gradient = loss_and_gradient(llm, batch)
    assert gradient.isfinite().all()
    assert abs(got - plain) < 2e-2 * plain
