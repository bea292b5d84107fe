"""Other people's attention for packed rows: rows unpacked to sequences against the dense mask, back ends inside models, and what is refused.

flash-attn and xformers attend on GPUs only; where they cannot run, their layout is checked with SDPA, one sequence at a time, in their place.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM, T5Config

from vpgtrans.engine import back_ends, regions
from vpgtrans.engine.data.packing import CaptionData, Group, pack_update
from vpgtrans.engine.kernel_choice import use_kernels
from vpgtrans.engine.loop import run
from vpgtrans.engine.models import attention_back_ends as module
from vpgtrans.engine.models.attention_back_ends import (
    attend,
    attend_repeated,
    back_end_unsupported_reason,
    flex,
    flex_blocks,
    layout_for,
    repeat_prefix,
    xformers_bias,
)
from vpgtrans.engine.models.causal import CausalLanguageModel
from vpgtrans.engine.recipe import Kernels, RecipeError, Step, load_recipe
from vpgtrans.engine.runtime import Runtime, start, stop
from vpgtrans.kernels.checks import assert_within_budget
from vpgtrans.kernels.prefix_attention import dense_mask, reference_prefix_attention

QUERIES = 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def packed(lengths: list[list[int]], row_tokens: int, leads: dict | None = None, fixed_shape: bool = False):
    """One micro-batch of images with captions of these lengths; leads: image -> number of tokens before its visual ones."""
    ids = [[[1] * n for n in captions] for captions in lengths]
    data = CaptionData("x", [None] * len(ids), ids, {i: (1,) * n for i, n in (leads or {}).items()})
    groups = [Group(i, 0, tuple(range(len(captions)))) for i, captions in enumerate(lengths)]
    (batch,) = pack_update(groups, data, QUERIES, row_tokens, 16, 0, fixed_shape=fixed_shape)
    return batch


def random_rows(seed: int):
    """Captions of 1 to 9 tokens, some images with one caption, some with more than a row holds, some with text before the picture; padding."""
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(1, 10, rng.integers(1, 7)).tolist() for _ in range(9)]
    return packed(lengths, 24, leads={0: 2, 3: 4}, fixed_shape=True)


def operands(segments, heads=4, kv_heads=2, head_size=8, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, tokens, _ = segments.shape
    # In memory as a model's projections: (rows, tokens, heads, head size).
    return [
        torch.randn(rows, tokens, n, head_size, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .transpose(1, 2)
        .requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


def sdpa_by_sequence(queries, keys, values, layout, scale):
    """What flash-attn's and xformers' functions promise: sequences by themselves, causal, aligned at the end."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
    done = []
    ends = zip(*(s.tolist() for s in (layout.query_starts, layout.key_starts)), strict=True)
    (q0, k0), *rest = ends
    for q1, k1 in rest:
        assert 0 < q1 - q0 <= k1 - k0 <= layout.longest_keys and q1 - q0 <= layout.longest_queries
        mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=queries.device).tril(k1 - k0 - q1 + q0)
        one = (t.transpose(0, 1) for t in (queries[q0:q1], keys[k0:k1], values[k0:k1]))
        done.append(F.scaled_dot_product_attention(*one, attn_mask=mask, scale=scale).transpose(0, 1))
        q0, k0 = q1, k1
    return torch.cat(done)


def test_sequences_by_hand():
    """Two captions behind one picture, one behind another, then padding, which sees itself."""
    batch = packed([[3, 2], [2]], 16, fixed_shape=True)
    layout = repeat_prefix(batch.segments)
    assert layout.query_starts.tolist() == [0, 6, 8, 13, 16]
    assert layout.key_tokens.tolist() == [0, 1, 2, 3, 4, 5, *(0, 1, 2, 6, 7), 8, 9, 10, 11, 12, 13, 14, 15]
    assert layout.key_starts.tolist() == [0, 6, 11, 16, 19]
    assert (layout.longest_queries, layout.longest_keys) == (6, 6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [None, 0.7])
def test_unpacked_rows_equal_the_dense_mask(seed, scale):
    """Output and every gradient in float64: a prefix's keys and values gather what all of its captions send."""
    segments = random_rows(seed).segments
    given = torch.randn(*segments.shape[:2], 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tensors = operands(segments)
    expected = reference_prefix_attention(*tensors, segments, scale).transpose(1, 2)
    wanted = torch.autograd.grad(expected, tensors, given)
    got = attend_repeated(*tensors, repeat_prefix(segments), scale, sdpa_by_sequence)
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)
    for gradient, exact in zip(torch.autograd.grad(got, tensors, given), wanted, strict=True):
        assert torch.allclose(gradient, exact, rtol=0, atol=1e-12)


def test_a_row_of_one_caption_repeats_nothing():
    segments = packed([[4]], 24).segments
    layout = repeat_prefix(segments)
    assert layout.key_tokens.tolist() == list(range(segments.shape[1]))


@pytest.mark.parametrize("seed", range(3))
def test_xformers_mask_is_the_dense_mask(seed):
    """xformers' own picture of its mask, folded back onto the rows' tokens: each visible pair once."""
    pytest.importorskip("xformers.ops", reason="xformers is not installed")
    segments = random_rows(seed).segments
    layout = repeat_prefix(segments)
    rows, tokens, _ = segments.shape
    bias = xformers_bias(layout, torch.device("cpu"))
    allowed = (bias.materialize((rows * tokens, len(layout.key_tokens))) == 0).int()
    pairs = torch.zeros(rows * tokens, rows * tokens, dtype=torch.int32).index_add_(1, layout.key_tokens, allowed)
    dense = torch.block_diag(*dense_mask(segments)[:, 0].int())
    assert torch.equal(pairs, dense.int())


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_flex_equals_the_dense_mask(heads):
    """Uncompiled on the CPU, where it has no backward."""
    segments = random_rows(0).segments
    with torch.no_grad():
        tensors = [t.detach() for t in operands(segments, *heads, dtype=torch.float32, head_size=16)]
        expected = reference_prefix_attention(*tensors, segments, 0.3)
        got = flex(*tensors, flex_blocks(segments), 0.3)
    assert torch.allclose(got.transpose(1, 2), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("back_end", ["flex", "flash", "xformers"])
def test_the_real_thing_on_a_gpu(back_end):
    """bf16 against float64, no worse than twice what sdpa behind the dense mask does; needs the package."""
    if reason := back_end_unsupported_reason(back_end, DEVICE, torch.bfloat16):
        pytest.skip(reason)
    segments = random_rows(0).segments

    def measure(dtype, run):
        tensors = operands(segments, head_size=64, dtype=dtype, device=DEVICE)
        out = run(*tensors)
        given = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return [out.detach(), *torch.autograd.grad(out, tensors, given.to(DEVICE, dtype))]

    plain = lambda *t: reference_prefix_attention(*t, segments.to(DEVICE)).transpose(1, 2)  # noqa: E731
    layout = layout_for(back_end, segments, DEVICE)
    exact, coarse = measure(torch.float64, plain), measure(torch.bfloat16, plain)
    got = measure(torch.bfloat16, lambda *t: attend(back_end, *t, layout, None))
    for name, *values in zip(("out", "dq", "dk", "dv"), got, exact, coarse, strict=True):
        assert_within_budget(name, *values)


def language_model(family, make_llm, tokenizer) -> CausalLanguageModel:
    """Tiny, with random weights that make attention far from uniform."""
    if family in ("llama", "opt"):
        return make_llm(family)
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config, model = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "mistral": (MistralConfig, MistralForCausalLM)}[family]
    torch.manual_seed(0)
    made = model(config(vocab_size=len(tokenizer), attn_implementation="sdpa", **sizes))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return CausalLanguageModel(made, tokenizer, f"tiny-{family}")


def loss_and_gradient(llm, batch, device="cpu"):
    prompts = torch.randn(len(batch.groups), QUERIES, llm.hidden_width, generator=torch.Generator().manual_seed(0))
    prompts = prompts.to(device).requires_grad_(torch.is_grad_enabled())
    loss = llm.loss_sum(prompts, batch)
    return (loss, torch.autograd.grad(loss, prompts)[0]) if torch.is_grad_enabled() else (loss,)


@pytest.fixture
def sdpa_for_flash(monkeypatch):
    """Sequences by sdpa in flash-attn's place, which runs on GPUs only; the number of its calls."""
    calls = []

    def varlen(*arguments):
        calls.append(1)
        return sdpa_by_sequence(*arguments)

    monkeypatch.setattr(module, "flash_varlen", varlen)
    return calls


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3", "mistral"])
def test_unpacked_rows_inside_a_model(family, make_llm, word_tokenizer, sdpa_for_flash):
    """Through transformers' attention interface: loss and gradient of the soft prompts are sdpa's, in both layers."""
    llm = language_model(family, make_llm, word_tokenizer)
    batch = packed([[4, 5, 3], [2, 6]], 16)
    expected = loss_and_gradient(llm, batch)
    llm.use_back_end("flash")
    sdpa_for_flash.clear()
    got = loss_and_gradient(llm, batch)
    assert len(sdpa_for_flash) == 2
    for value, exact in zip(got, expected, strict=True):
        assert torch.allclose(value, exact, rtol=2e-5, atol=2e-5)
    moved = loss_and_gradient(llm, batch.to(torch.device("cpu")))
    assert torch.equal(moved[0], got[0])


@pytest.mark.parametrize("back_end", ["flex", "flash", "xformers"])
def test_the_real_thing_inside_a_model_on_a_gpu(back_end, make_llm):
    """Loss and gradient of the soft prompts in bf16 against float64, no worse than twice what sdpa behind the dense mask does."""
    if reason := back_end_unsupported_reason(back_end, DEVICE, torch.bfloat16):
        pytest.skip(reason)
    llm = make_llm("llama", width=128)
    batch = packed([[4, 5, 3], [2, 6]], 16).to(DEVICE)
    llm.to(DEVICE, torch.float64)
    exact = loss_and_gradient(llm, batch, DEVICE)
    llm.to(torch.bfloat16)
    plain = loss_and_gradient(llm, batch, DEVICE)
    llm.use_back_end(back_end)
    for name, *values in zip(("loss", "gradient"), loss_and_gradient(llm, batch, DEVICE), exact, plain, strict=True):
        assert_within_budget(name, *(value.detach() for value in values))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_inside_a_model(make_llm):
    llm = make_llm("llama")
    batch = packed([[4, 5, 3], [2, 6]], 16)
    with torch.no_grad():
        (expected,) = loss_and_gradient(llm, batch)
        llm.use_back_end("flex")
        (got,) = loss_and_gradient(llm, batch)
    assert torch.allclose(got, expected, rtol=2e-5)


def test_a_mask_that_is_wrong_is_noticed(make_llm, monkeypatch):
    """The contract is checked through the back end; where it fails, the model attends as before."""
    llm = make_llm("llama")
    broken = lambda q, k, v, layout, scale: sdpa_by_sequence(q, k.flip(0), v, layout, scale)  # noqa: E731
    monkeypatch.setattr(module, "flash_varlen", broken)
    with pytest.raises(ValueError, match="does not honour a shared prefix"):
        llm.use_back_end("flash")
    assert llm.model.config._attn_implementation == "sdpa"


def test_other_masks_attend_as_before(make_llm, sdpa_for_flash):
    llm = make_llm("llama")
    ids = torch.tensor([[3, 4, 5, 6], [0, 0, 3, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])

    def generate():
        made = llm.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
        return llm.model(input_ids=ids, attention_mask=mask).logits, llm.model(input_ids=ids).logits, made

    expected = generate()
    llm.use_back_end("flash")
    sdpa_for_flash.clear()
    for got, wanted in zip(generate(), expected, strict=True):
        assert torch.equal(got, wanted)
    assert not sdpa_for_flash


def test_a_model_that_keeps_keyword_arguments_to_itself_is_refused(make_llm, sdpa_for_flash, monkeypatch):
    llm = make_llm("llama")
    whole = llm.model.base_model.forward
    monkeypatch.setattr(llm.model.base_model, "forward", lambda packed=None, **more: whole(**more))
    with pytest.raises(ValueError, match="does not hand on keyword arguments"):
        llm.use_back_end("flash")


def test_dropout_is_left_to_sdpa(make_llm, sdpa_for_flash, caplog):
    llm = make_llm("llama")
    batch = packed([[4, 5, 3], [2, 6]], 16)
    llm.use_back_end("flash")
    sdpa_for_flash.clear()
    llm.model.train()
    for layer in llm.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    loss_and_gradient(llm, batch)
    assert not sdpa_for_flash and "dropout 0.5 is left to sdpa" in caplog.text


def test_what_cannot_run_is_said_before_anything_is_loaded(tiny_recipe, tmp_path, tmp_path_factory):
    """In order: an encoder-decoder, a package that is not there, a device that it does not run on; nothing is written."""
    folder = tmp_path / "nothing"
    base = [f"output.folder={folder}", "device=cpu"]
    with pytest.raises(
        RecipeError, match=r"attention: expected auto or sdpa here, got flex: FlexAttention has no backward on the CPU"
    ):
        run(load_recipe(tiny_recipe, [*base, "attention=flex"]))
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(RecipeError, match=r"got flash: flash-attn is not installed \(pip install .*flash-attn"):
            run(load_recipe(tiny_recipe, [*base, "attention=flash"]))
    if importlib.util.find_spec("xformers") is None:
        with pytest.raises(RecipeError, match=r"got xformers: xformers is not installed \(pip install .*xformers"):
            run(load_recipe(tiny_recipe, [*base, "attention=xformers"]))
    seq2seq = tmp_path_factory.mktemp("t5")
    T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=16).save_pretrained(seq2seq)
    recipe = load_recipe(tiny_recipe, [*base, f"target.llm={seq2seq}", "attention=flex"])
    with pytest.raises(RecipeError, match=r"encoder-decoder \(t5\), which has no packed rows"):
        back_ends.check_back_ends(recipe)
    back_ends.check_back_ends(load_recipe(tiny_recipe, [*base, f"target.llm={seq2seq}", "attention=sdpa"]))
    assert not folder.exists()


def test_float32_is_refused_by_what_has_half_precision_only(monkeypatch):
    monkeypatch.setattr(module, "_import_reason", lambda back_end: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda")
    assert "not in float32" in back_end_unsupported_reason("flash", cuda, torch.float32)
    assert back_end_unsupported_reason("flash", cuda, torch.bfloat16) is None
    assert back_end_unsupported_reason("flex", cuda, torch.float32) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 7.5" in back_end_unsupported_reason("xformers", cuda)


def test_a_kernel_and_a_back_end_are_not_both_asked_for(tiny_recipe):
    with pytest.raises(RecipeError, match=r"attention, kernels\.prefix_attention: .* got 'flash' and 'kernel'"):
        load_recipe(tiny_recipe, ["attention=flash", "kernels.prefix_attention=kernel"])
    with pytest.raises(RecipeError, match=r"got 'sdpa' and 'kernel'"):
        load_recipe(tiny_recipe, ["attention=sdpa", "kernels.prefix_attention=kernel"])
    assert load_recipe(tiny_recipe, ["attention=sdpa", "kernels.prefix_attention=torch"]).attention == "sdpa"
    with pytest.raises(RecipeError, match=r"attention: .*'auto', 'sdpa', 'flex', 'flash' or 'xformers'"):
        load_recipe(tiny_recipe, ["attention=fast"])


def test_rows_of_changing_shape_are_neither_captured_nor_compiled(
    tiny_recipe, make_llm, make_vlm, sdpa_for_flash, monkeypatch
):
    with pytest.raises(RecipeError, match=r"attention, step\.cuda_graphs: .* got 'flash' and true"):
        load_recipe(tiny_recipe, ["attention=flash", "step.cuda_graphs=true"])
    model, compiled = make_vlm(make_llm("llama")), []
    monkeypatch.setattr(regions, "compile_blocks", lambda part, backend: compiled.append(part))
    monkeypatch.setattr(regions, "graphs_unsupported_reason", lambda device: None)
    tower, layout = SimpleNamespace(module=torch.nn.Sequential()), SimpleNamespace(rows_per_micro_batch=2)
    runtime = Runtime(torch.device("cpu"), torch.float32, 0, 1)
    regions.use_regions(Step(compile=True), model, tower, layout, runtime)
    assert compiled == [tower.module, model.vpg.qformer, model.llm.model]
    model.llm.use_back_end("flash")
    compiled.clear()
    regions.use_regions(Step(compile=True), model, tower, layout, runtime)
    assert compiled == [tower.module, model.vpg.qformer]
    with pytest.raises(RecipeError, match=r"step\.cuda_graphs: .* attention is flash, whose layout"):
        regions.use_regions(Step(cuda_graphs=True), model, tower, layout, runtime)


def test_what_the_savings_table_says(make_llm, make_vlm, no_tower, sdpa_for_flash):
    runtime = start("cpu", "fp32", 1, 0)
    try:
        found = {
            c.name: c for c in use_kernels(Kernels(), make_vlm(make_llm("llama")), no_tower, runtime, None, "flash")
        }
        assert found["packed attention"].on and found["packed attention"].why == "attention is flash"
        assert not found["prefix_attention"].on and "attention is flash" in found["prefix_attention"].why
        assert "packed attention" not in {
            c.name for c in use_kernels(Kernels(), make_vlm(make_llm("opt")), no_tower, runtime, None)
        }
        llm = make_llm("llama")
        llm.model.config._attn_implementation = "eager"
        with pytest.raises(RecipeError, match="attends by eager"):
            use_kernels(Kernels(), make_vlm(llm), no_tower, runtime, None, "flash")
    finally:
        stop()
