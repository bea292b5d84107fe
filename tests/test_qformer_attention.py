"""The Q-Former's cross-attention: both forms and the kernels against float64, dropout's mask, who needs a gradient, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vpgtrans.kernels import qformer_latents
from vpgtrans.kernels.checks import assert_within_budget, largest_error, poisoned_memory
from vpgtrans.kernels.frozen_linear import reference_quantise_rows
from vpgtrans.kernels.philox import dropout_keep, dropout_threshold, philox, seed_tensor
from vpgtrans.kernels.qformer_attention import (
    AttentionShape,
    CrossWeights,
    choose_form,
    dequantise_tokens,
    fold_norm,
    form_cost,
    form_keys_values,
    qformer_attention,
    qformer_attention_unsupported_reason,
    reference_qformer_attention,
)
from vpgtrans.kernels.qformer_latents import (
    LaunchConfig,
    fold,
    key_split,
    launch_config,
    mix_backward,
    mix_forward,
    padded_keys,
)
from vpgtrans.kernels.triton_support import log_fallback_once

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP8 = torch.float8_e4m3fn
NAMES = ("queries", "image", *CrossWeights._fields)
# batch, queries, heads, width of a head, image tokens, their width.  130 rows are two blocks; 257 tokens take all three pieces.  Much smaller
# and the largest of a few bf16 errors is a matter of luck, of plain torch's as of ours.
SHAPES = {
    "small": (2, 6, 2, 8, 17, 24),
    "smallest": (1, 1, 1, 1, 1, 1),
    "odd width": (2, 5, 3, 8, 40, 71),
    "two blocks": (1, 65, 2, 4, 5, 20),
    "real tokens": (1, 4, 3, 8, 257, 80),
    "two halves": (1, 2, 2, 8, 200, 32),
}


def make(shape, dtype=torch.float32, seed=0):
    """(queries, image, weights), leaves that need a gradient."""
    batch, queries, heads, head_width, keys, width = shape
    hidden = heads * head_width
    generator = torch.Generator().manual_seed(seed)

    def leaf(*sizes, scale=1.0):
        values = torch.randn(*sizes, generator=generator, dtype=torch.float64) * scale
        return values.to(DEVICE, dtype).requires_grad_()

    square, wide = (hidden, hidden), (hidden, width)
    weights = CrossWeights(*(
        leaf(*sizes, scale=1.0 if len(sizes) == 1 else sizes[1] ** -0.5)
        for sizes in (square, square[:1], wide, wide[:1], wide, wide[:1], square, square[:1])
    ))  # fmt: skip
    return leaf(batch, queries, hidden, scale=2.0), leaf(batch, keys, width), weights


def results(run, inputs, heads, **options):
    """Output and the gradient of each input, of one fixed weighting of the output."""
    queries, image, weights = inputs
    out = run(queries, image, weights, heads, **options)
    weighting = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view_as(out).to(out.dtype)
    return (out, *torch.autograd.grad(out, (queries, image, *weights), weighting, materialize_grads=True))


def in_double(inputs):
    queries, image, weights = inputs
    wide = [t.detach().double().requires_grad_() for t in (queries, image, *weights)]
    return wide[0], wide[1], CrossWeights(*wide[2:])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_forward_and_every_gradient(name, dtype, dropout_p):
    shape = SHAPES[name]
    inputs, options = make(shape, dtype), {"dropout_p": dropout_p, "seed": 11}
    exact = results(reference_qformer_attention, in_double(inputs), shape[2], **options)
    plain = results(reference_qformer_attention, inputs, shape[2], **options)
    with poisoned_memory():
        got = results(qformer_attention, inputs, shape[2], impl="triton", **options)
    for part, result, right, usual in zip(("out", *NAMES), got, exact, plain, strict=True):
        if part == "key_bias":
            assert not result.any() and result.shape == right.shape
            continue
        assert_within_budget(f"{name}: {part}", result, right, usual)


def in_fp8(image):
    """The tokens in e4m3 with a scale each, of sizes that differ from token to token."""
    sizes = torch.logspace(-1, 0, image.shape[1], device=image.device)
    rows = reference_quantise_rows((image.detach().float() * sizes[:, None]).flatten(0, 1))
    return rows.values.view(image.shape), rows.scales.view(image.shape[:2])


@pytest.mark.parametrize("generation", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"impl": "triton"}, {"impl": "reference"}, {"form": "formed"}])
def test_tokens_in_fp8_are_the_tokens_they_stand_for(options, dtype, generation, monkeypatch):
    """Bit for bit the results of the converted tokens, forward and every gradient; generation 80 has no e4m3 and takes its bits apart."""
    monkeypatch.setattr(qformer_latents, "architecture", lambda device: generation)
    shape = SHAPES["odd width"]
    queries, image, weights = make(shape, dtype)
    values, scale = in_fp8(image)
    leaves = (queries, *weights)

    def results(tokens, **more):
        out = qformer_attention(queries, tokens, weights, shape[2], dropout_p=0.3, seed=11, **options, **more)
        return (out, *torch.autograd.grad(out.square().sum(), leaves, materialize_grads=True))

    expected = results(dequantise_tokens(values, scale, dtype))
    with poisoned_memory():
        got = results(values, token_scale=scale)
    assert all(torch.equal(ours, right) for ours, right in zip(got, expected, strict=True))
    exact = reference_qformer_attention(
        queries.double(), values, CrossWeights(*(w.double() for w in weights)), shape[2], dropout_p=0.3, seed=11, token_scale=scale
    )  # fmt: skip
    plain = reference_qformer_attention(queries, values, weights, shape[2], dropout_p=0.3, seed=11, token_scale=scale)
    assert_within_budget("out", got[0], exact, plain)


def test_every_e4m3_value_comes_through_the_bits(monkeypatch):
    """One token, so its probability is 1: what is mixed is the token, whichever way it is converted."""
    values = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    values = values[(values & 0x7F) != 0x7F].view(torch.float8_e4m3fn)[None, None]  # all but NaN
    folded = torch.zeros(1, 1, 1, values.shape[-1], device=DEVICE)
    scale = torch.full((1, 1), 3.0, device=DEVICE)
    for generation in (80, 90):
        monkeypatch.setattr(qformer_latents, "architecture", lambda device, generation=generation: generation)
        mixed = mix_forward(folded, values, scale, None, 1.0, 0.0, False)[0]
        assert torch.equal(mixed[0], 3 * values.float())


@pytest.mark.parametrize("form", ["formed", "latents"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_both_forms_in_torch(form, dropout_p):
    shape = SHAPES["odd width"]
    options = {"dropout_p": dropout_p, "seed": 11}
    impl = "reference" if form == "latents" else None
    exact = results(reference_qformer_attention, in_double(make(shape)), shape[2], **options)
    plain = results(reference_qformer_attention, make(shape), shape[2], **options)
    got = results(qformer_attention, make(shape), shape[2], form=form, impl=impl, **options)
    for part, result, right, usual in zip(("out", *NAMES), got, exact, plain, strict=True):
        if part != "key_bias":
            assert_within_budget(f"{form}: {part}", result, right, usual)


def test_the_latents_gradients_by_finite_differences():
    shape = (1, 2, 2, 2, 3, 3)
    queries, image, weights = make(shape, torch.float64)

    def run(queries, image, key, value, value_bias):
        changed = weights._replace(key=key, value=value, value_bias=value_bias)
        return qformer_attention(queries, image, changed, 2, form="latents", impl="reference", dropout_p=0.4, seed=3)

    assert torch.autograd.gradcheck(run, (queries, image, weights.key, weights.value, weights.value_bias))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    "needed", [("queries",), ("image",), ("key",), ("value",), ("value_bias",), ("queries", "value"), ("key", "image")]
)
def test_only_what_is_asked_for_is_computed(impl, needed):
    shape = SHAPES["small"]
    queries, image, weights = make(shape)
    options = {"dropout_p": 0.2, "seed": 7}
    everything = dict(
        zip(NAMES, results(qformer_attention, (queries, image, weights), 2, impl=impl, **options)[1:], strict=True)
    )
    inputs = {n: t.detach().requires_grad_(n in needed) for n, t in zip(NAMES, (queries, image, *weights), strict=True)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        out = qformer_attention(
            inputs["queries"], inputs["image"], CrossWeights(*list(inputs.values())[2:]), 2, impl=impl, **options
        )
    mixed = (2, 6, 2, 24)
    assert (mixed in saved) == ("value" in needed)
    weighting = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view_as(out).to(out.dtype)
    out.backward(weighting)
    for name, tensor in inputs.items():
        if name in needed:
            torch.testing.assert_close(tensor.grad, everything[name], rtol=0, atol=0)
        else:
            assert tensor.grad is None


def test_without_biases():
    shape = SHAPES["small"]
    queries, image, weights = make(shape)
    bare = weights._replace(query_bias=None, key_bias=None, value_bias=None, output_bias=None)
    exact = reference_qformer_attention(
        queries.double(), image.double(), CrossWeights(*(w if w is None else w.double() for w in bare)), 2
    )
    plain = reference_qformer_attention(queries, image, bare, 2)
    for options in ({"impl": "triton"}, {"form": "formed"}):
        assert_within_budget(str(options), qformer_attention(queries, image, bare, 2, **options), exact, plain)


def test_non_contiguous_inputs():
    shape = SHAPES["odd width"]
    queries, image, weights = make(shape)
    strided = (
        queries.detach().mT.contiguous().mT,
        torch.cat([image, image], -1).detach()[..., : image.shape[-1]],
        CrossWeights(*(w.detach().repeat_interleave(2, -1)[..., ::2] for w in weights)),
    )
    assert not any(t.is_contiguous() for t in (*strided[:2], *strided[2]))
    torch.testing.assert_close(
        qformer_attention(*strided, 3, impl="triton"),
        qformer_attention(queries, image, weights, 3, impl="triton"),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{"impl": "triton"}, {"impl": "reference"}, {"form": "formed"}])
def test_an_empty_batch(options):
    queries, image, weights = make((0, 3, 2, 4, 17, 24))
    out, *grads = results(qformer_attention, (queries, image, weights), 2, dropout_p=0.1, seed=1, **options)
    assert out.shape == (0, 3, 8)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, (queries, image, *weights), strict=True))


def test_large_scores_stay_finite():
    queries, image, weights = make(SHAPES["small"], torch.bfloat16)
    out = qformer_attention(queries * 1e4, image * 1e3, weights, 2, impl="triton")
    assert out.isfinite().all()


def test_the_mask_is_philox_by_seed_and_position():
    """The known answer is Random123's for Philox-4x32-10 at counter and key zero."""
    words = philox(torch.tensor(0), torch.tensor([0]), torch.tensor([0]))
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    keep = dropout_keep(5, 0.25, 4, 3, 32, 257, DEVICE)
    dropped = 1 - keep.double().mean().item()
    assert abs(dropped - 0.25) < 4 * (0.25 * 0.75 / keep.numel()) ** 0.5
    assert torch.equal(keep[:2], dropout_keep(5, 0.25, 2, 3, 32, 257, DEVICE))
    assert torch.equal(keep[..., :9], dropout_keep(5, 0.25, 4, 3, 32, 9, DEVICE))
    assert 0.5 < (keep == dropout_keep(6, 0.25, 4, 3, 32, 257, DEVICE)).double().mean() < 0.7
    assert dropout_threshold(0.1) == (6554, 65536 / (65536 - 6554))


def test_the_seed():
    queries, image, weights = make(SHAPES["small"])

    def run(seed, **options):
        return qformer_attention(queries, image, weights, 2, dropout_p=0.5, seed=seed, **options)

    assert torch.equal(run(3, impl="triton"), run(seed_tensor(3, DEVICE), impl="triton"))
    assert largest_error(run(-(1 << 63), form="formed"), run(-(1 << 63), impl="triton")) < 1e-5
    assert not torch.equal(run(3, impl="triton"), run(4, impl="triton"))
    for options in ({"impl": "triton"}, {"form": "formed"}):
        torch.manual_seed(0)
        first, second = run(None, **options), run(None, **options)
        torch.manual_seed(0)
        assert torch.equal(first, run(None, **options)) and not torch.equal(first, second)
    with torch.no_grad():
        assert torch.equal(run(3, impl="triton"), run(3, impl="triton"))


def test_keys_and_values_of_all_layers_by_one_product():
    layers = [make(SHAPES["odd width"], seed=i)[2] for i in range(3)]
    queries, image, _ = make(SHAPES["odd width"])
    layers[1] = layers[1]._replace(key=layers[1].key.detach(), value_bias=None)
    leaves = [image, *(t for w in layers for t in (w.key, w.value, w.value_bias) if t is not None and t.requires_grad)]

    def total(attend):
        return sum((attend(i, w) * (i + 1)).square().sum() for i, w in enumerate(layers))

    pairs = form_keys_values(image, layers)
    assert len({key.untyped_storage().data_ptr() for pair in pairs for key in pair}) == 1
    ours = total(lambda i, w: qformer_attention(queries, image, w, 3, keys_values=pairs[i]))
    plain = total(lambda i, w: reference_qformer_attention(queries, image, w, 3))
    torch.testing.assert_close(ours, plain)
    grads = zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves), strict=True)
    for grad, expected in grads:
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


def test_fold_norm_replaces_the_affine_and_its_gradients():
    queries, image, weights = make(SHAPES["odd width"], torch.float64)
    scale, shift = (torch.randn(71, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2))
    normalised = F.layer_norm(image.detach(), (71,))
    usual = reference_qformer_attention(queries, normalised * scale + shift, weights, 3)
    folded = qformer_attention(queries, normalised, fold_norm(weights, scale, shift), 3, form="latents")
    torch.testing.assert_close(folded, usual)
    leaves = (queries, scale, shift, weights.key, weights.value, weights.value_bias)
    for grad, expected in zip(
        torch.autograd.grad(folded.square().sum(), leaves), torch.autograd.grad(usual.square().sum(), leaves), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(grad, expected)


def test_autocast():
    inputs = make(SHAPES["small"])
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got = results(qformer_attention, inputs, 2, impl="triton")
        pairs = form_keys_values(inputs[1], [inputs[2]])
    assert got[0].dtype == pairs[0][0].dtype == torch.bfloat16
    assert {g.dtype for g in got[1:]} == {torch.float32}
    exact = results(reference_qformer_attention, in_double(inputs), 2)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        plain = results(reference_qformer_attention, inputs, 2)
    for part, result, right, usual in zip(("out", *NAMES), got, exact, plain, strict=True):
        if part != "key_bias":
            assert_within_budget(part, result.bfloat16(), right, usual.bfloat16())


def test_the_operators_are_sound_and_compile():
    queries, image, weights = make(SHAPES["small"])
    detached = [t.detach() for t in (queries, image, *weights)]
    folded = fold(detached[0], detached[4], 2)
    seed = seed_tensor(1, DEVICE)
    probabilities = mix_forward(folded, detached[1], None, seed, 0.5, 0.1, True)[1]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(fold, (detached[0], detached[4], 2), test_utils=checks)
    torch.library.opcheck(mix_forward, (folded, detached[1], None, seed, 0.5, 0.1, True), test_utils=checks)
    arguments = (folded, detached[1], None, probabilities, None, 0.5, 0.1, True, True)
    torch.library.opcheck(mix_backward, arguments, test_utils=checks)
    compiled = torch.compile(
        lambda q, e: qformer_attention(q, e, weights, 2, impl="triton"), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(queries, image), qformer_attention(queries, image, weights, 2, impl="triton"))


REAL = AttentionShape(batch=36, queries=32, keys=257, width=1408, hidden=768, heads=12)


def test_the_form_by_shape():
    def chosen(device="cuda", gradients=True, image_gradient=False, **changes):
        shape = AttentionShape(**{**REAL.__dict__, **changes})
        return choose_form(shape, gradients=gradients, image_gradient=image_gradient, device=device)

    assert chosen(device="cpu") == chosen(device="cpu", gradients=False) == "latents"
    assert chosen() == "formed", "folded operands pass through memory: no gain at 257 tokens"
    assert chosen(queries=16) == "latents" and chosen(queries=16, keys=577) == "formed", "no kernel beyond 272"
    assert chosen(queries=64) == chosen(queries=64, device="cpu") == "formed"
    gflop = {form: form_cost(REAL, form, False, False, 0) / REAL.batch / 1e9 for form in ("formed", "latents")}
    assert gflop == pytest.approx({"formed": 1.137, "latents": 0.694}, abs=2e-3)


def test_launch_settings_and_pieces():
    assert key_split(257) == key_split(272) == (128, True, True)
    assert key_split(256) == (128, True, False) and key_split(144) == (128, False, True)
    assert key_split(1) == key_split(16) == (16, False, False) and key_split(17) == (32, False, False)
    for keys in range(1, 273):
        half, second, tail = key_split(keys)
        assert keys <= half * (1 + second) + 16 * tail and padded_keys(keys) % 16 == 0
    assert launch_config(torch.bfloat16, 90) == LaunchConfig(128, 64, 32, 8, 3)
    assert launch_config(torch.bfloat16, 80) == LaunchConfig(64, 16, 32, 8, 3)
    assert launch_config(torch.float32, 90).block_rows == 32


def test_reasons(caplog):
    assert "272" in qformer_attention_unsupported_reason(AttentionShape(1, 32, 577, 64, 64, 2), torch.bfloat16, DEVICE)
    assert "float64" in qformer_attention_unsupported_reason(REAL, torch.float64, DEVICE)
    assert "65535" in qformer_attention_unsupported_reason(
        AttentionShape(70000, 32, 257, 64, 64, 2), torch.bfloat16, DEVICE
    )
    assert "2^32" in qformer_attention_unsupported_reason(
        AttentionShape(1 << 28, 32, 257, 64, 64, 2), torch.bfloat16, DEVICE
    )
    assert "NVIDIA" in qformer_attention_unsupported_reason(REAL, torch.bfloat16, torch.device("meta"))
    queries, image, weights = make(SHAPES["smallest"], torch.float64)
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run here: .*float64"):
        qformer_attention(queries, image, weights, 1, impl="triton")
    log_fallback_once.cache_clear()
    for _ in range(2):
        qformer_attention(queries, image, weights, 1, form="latents")
    assert [r.getMessage() for r in caplog.records] == [
        "qformer_attention (latents) runs its torch reference: the kernels take bfloat16, float16 and float32, got torch.float64"
    ]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": torch.zeros(2, 8)}, ValueError, r"expected queries \(B, Q, D\) and image"),
        ({"image": torch.zeros(3, 5, 24)}, ValueError, r"got \(2, 3, 8\) and \(3, 5, 24\)"),
        ({"image": torch.zeros(2, 0, 24)}, ValueError, "at least one token"),
        ({"heads": 3}, ValueError, "heads is 3, expected a divisor of the hidden width 8"),
        ({"key": torch.zeros(8, 23)}, ValueError, r"key has shape \(8, 23\), expected \(8, 24\)"),
        ({"output_bias": torch.zeros(9)}, ValueError, r"output_bias has shape \(9,\)"),
        ({"value": torch.zeros(8, 24, dtype=torch.bfloat16)}, TypeError, "value is torch.bfloat16, expected torch.float32"),
        ({"queries": torch.zeros(2, 3, 8, dtype=torch.int64)}, TypeError, "expected a floating dtype"),
        ({"image": torch.zeros(2, 5, 24, device="meta")}, ValueError, "image is on meta"),
        ({"image": torch.zeros(2, 5, 24).to(FP8)}, TypeError, "means nothing without its token_scale"),
        ({"token_scale": torch.ones(2, 5)}, TypeError, r"image is torch.float32, expected torch.float8_e4m3fn"),
        ({"image": torch.zeros(2, 5, 24).to(FP8), "token_scale": torch.ones(2, 4)}, ValueError, r"token_scale is .* expected torch.float32 \(2, 5\)"),
        ({"image": torch.zeros(2, 5, 24, device="meta").to(FP8), "token_scale": torch.ones(2, 5, device="meta")}, ValueError, "image is on meta"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0, expected 0 <= dropout_p < 1"),
        ({"seed": torch.zeros(2)}, ValueError, "int64 tensor of no dimension"),
        ({"seed": 1 << 63}, ValueError, "expected 64 bits"),
        ({"form": "fused"}, ValueError, "form is 'fused', expected None, 'formed' or 'latents'"),
        ({"impl": "cuda"}, ValueError, "impl is 'cuda'"),
        ({"impl": "triton", "form": "formed"}, ValueError, "kernels for the latents form only"),
        ({"form": "latents", "keys_values": (torch.zeros(2, 5, 8),) * 2}, ValueError, "leave out one"),
        ({"keys_values": (torch.zeros(2, 4, 8),) * 2}, ValueError, r"keys_values\[0\] has shape \(2, 4, 8\)"),
    ],
)  # fmt: skip
def test_what_is_refused(change, error, message):
    hidden, width = 8, 24
    arguments = {"queries": torch.zeros(2, 3, hidden), "image": torch.zeros(2, 5, width), "heads": 2}
    square, wide = torch.zeros(hidden, hidden), torch.zeros(hidden, width)
    fields = dict(
        zip(CrossWeights._fields, (square, square[0], wide, square[0], wide, square[0], square, square[0]), strict=True)
    )
    for name, value in change.items():
        (fields if name in fields else arguments)[name] = value
    with pytest.raises(error, match=message):
        qformer_attention(weights=CrossWeights(**fields), **arguments)


def test_key_value_errors():
    with pytest.raises(ValueError, match="layers is empty"):
        form_keys_values(torch.zeros(1, 2, 3), [])
    weights = make(SHAPES["small"])[2]
    with pytest.raises(ValueError, match=r"layers\[0\].key is .* expected torch.float32 \(16, 3\)"):
        form_keys_values(torch.zeros(1, 2, 3, device=DEVICE), [weights])
    with pytest.raises(ValueError, match=r"expected \(B, N, W\)"):
        form_keys_values(torch.zeros(2, 24, device=DEVICE), [weights])


def test_compiled_budgets(compiled_kernels):
    """At 32 queries of 12 heads, 257 tokens of width 1408 in bf16 and e4m3.  What spills does so between the loops of the products."""
    for kernel in compiled_kernels("qformer_attention"):
        assert kernel["registers"] <= 255 and kernel["loop_local_accesses"] == 0, kernel
        if kernel["architecture"] == 90:
            assert kernel["wgmma"] >= 29 and kernel["mma"] == 0, kernel
            assert kernel["shared_bytes"] <= 160 * 1024, kernel
        else:
            assert kernel["mma"] >= 102, kernel
            assert kernel["shared_bytes"] <= 48 * 1024, kernel
        assert kernel["spill_bytes"] <= SPILL_BYTES[kernel["name"]][kernel["architecture"] == 80], kernel


# (sm_90, sm_80)
SPILL_BYTES = {"forward": (576, 0), "backward": (432, 32), "forward, e4m3": (640, 0), "backward, e4m3": (1184, None)}
