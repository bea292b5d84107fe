"""Prefix attention: the mask by hand, the kernels against float64, and any language model through transformers' attention interface."""

from __future__ import annotations

import itertools

import pytest
import torch

from vpgtrans.kernels.checks import assert_within_budget, poisoned_memory
from vpgtrans.kernels.prefix_attention import (
    dense_mask,
    launch_config,
    padded_head_size,
    prefix_attention,
    prefix_attention_unsupported_reason,
    reference_prefix_attention,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHARED_KIB = {80: 163, 90: 227}


def describe(rows: list[list[tuple[int, list[int]]]], tokens: int) -> torch.Tensor:
    """Segments of rows of images, (prefix tokens, [caption tokens...]) each; padding at the end."""
    segments = torch.zeros(len(rows), tokens, 4, dtype=torch.int32)
    for row, images in enumerate(rows):
        at = 0
        for prefix, captions in images:
            stop, end = at + prefix, at + prefix + sum(captions)
            segments[row, at:stop] = torch.tensor([at, stop, stop, end])
            start = stop
            for length in captions:
                segments[row, start : start + length] = torch.tensor([at, stop, start, start + length])
                start += length
            at = end
        segments[row, at:] = torch.tensor([at, tokens, tokens, tokens])
    return segments.to(DEVICE)


def inputs(segments, heads=2, kv_heads=1, head_size=16, dtype=torch.float32, seed=0):
    rows, tokens, _ = segments.shape
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, n, tokens, head_size) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes]


def with_gradients(run, tensors, gradient, needs=(True, True, True)):
    leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    out = run(*leaves)
    out.backward(gradient.to(out.dtype))
    return [out.detach(), *(t.grad for t in leaves)]


def check(segments, heads=2, kv_heads=1, head_size=16, dtype=torch.float32, scale=None):
    """Kernels against float64, forward and three gradients, with torch in the same dtype as the measure."""
    *tensors, gradient = inputs(segments, heads, kv_heads, head_size, dtype)
    with poisoned_memory():
        got = with_gradients(lambda *t: prefix_attention(*t, segments, scale, impl="triton"), tensors, gradient)
    plain = with_gradients(lambda *t: reference_prefix_attention(*t, segments, scale), tensors, gradient)
    exact = with_gradients(
        lambda *t: reference_prefix_attention(*t, segments, scale), [t.double() for t in tensors], gradient
    )
    for name, *values in zip(("out", "dq", "dk", "dv"), got, exact, plain, strict=True):
        assert_within_budget(name, *values)


def test_dense_mask_by_hand():
    (mask,) = dense_mask(describe([[(2, [2, 1]), (1, [1])]], 8))[:, 0]
    seen = [torch.nonzero(row).flatten().tolist() for row in mask]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [5], [5, 6], [7]]


def test_reference_is_the_formula_in_float64():
    """Softmax written out, and its gradients by finite differences."""
    segments = describe([[(2, [2, 1]), (1, [1])]], 8)
    q, k, v, _ = (t.double() for t in inputs(segments, heads=4, kv_heads=2, head_size=4))
    scores = q.unflatten(1, (2, 2)) @ k[:, :, None].mT / 2
    p = scores.masked_fill(~dense_mask(segments)[:, None], -torch.inf).softmax(-1)
    expected = (p @ v[:, :, None]).flatten(1, 2)
    assert torch.allclose(prefix_attention(q, k, v, segments), expected, atol=1e-12)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *t: reference_prefix_attention(*t, segments), leaves)


ROWS = [[(5, [3, 4]), (2, [7, 1, 3])], [(4, [9])]]  # 27 tokens and 13 + 14 of padding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (3, 1)])
def test_kernels_against_float64(dtype, heads, kv_heads):
    check(describe(ROWS, 27), heads, kv_heads, 16, dtype)


@pytest.mark.parametrize("head_size", [8, 64, 80, 96, 128, 256])
def test_head_sizes(head_size):
    check(describe([[(5, [3, 4]), (2, [3])]], 19), 2, 1, head_size, torch.bfloat16)


@pytest.mark.parametrize(
    "images, tokens",
    [
        ([(1, [])], 1),
        ([(63, []), (1, [])], 64),  # a block whose last query is alone
        ([(3, [60, 20, 70])], 153),  # two ranges: the prefix, then a gap of hidden captions
        ([(40, [1] * 30)], 70),
        ([], 65),  # padding only
        ([(66, [66])], 133),
    ],
)
def test_odd_lengths(images, tokens):
    check(describe([images], tokens), 1, 1, 16)


def test_extreme_scores_and_scale():
    segments = describe(ROWS, 27)
    q, k, v, _ = inputs(segments)
    got = prefix_attention(q * 1e4, k, v, segments, impl="triton")
    exact = reference_prefix_attention(q.double() * 1e4, k.double(), v.double(), segments)
    assert_within_budget("out", got, exact, reference_prefix_attention(q * 1e4, k, v, segments))
    check(segments, scale=0.5)


def test_a_query_that_sees_nothing_gets_zeros():
    segments = describe([[(2, [2])]], 4)
    segments[0, 3] = torch.tensor([0, 0, 4, 4])
    *tensors, gradient = inputs(segments)
    got = with_gradients(lambda *t: prefix_attention(*t, segments, impl="triton"), tensors, gradient)
    plain = with_gradients(lambda *t: reference_prefix_attention(*t, segments), tensors, gradient)
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), got, plain, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5), name
    assert not got[0][:, :, 3].any() and not got[1][:, :, 3].any()


def test_blocks_that_hold_nothing_visible_are_skipped():
    """NaN values of a caption, and NaN gradients of the next one: 0 times NaN would show where a block is visited."""
    segments = describe([[(3, [125, 20])]], 148)
    q, k, v, gradient = inputs(segments, 1, 1)
    hidden = v.clone()
    hidden[:, :, 3:128] = torch.nan
    out = prefix_attention(q, k, hidden, segments, impl="triton")
    assert torch.equal(out[:, :, 128:], prefix_attention(q, k, v, segments, impl="triton")[:, :, 128:])
    gradient[:, :, 128:] = torch.nan
    _, _, dk, dv = with_gradients(lambda *t: prefix_attention(*t, segments, impl="triton"), (q, k, v), gradient)
    for part in (dk, dv):
        assert part[:, :, 64:128].isfinite().all() and part[:, :, 128:].isnan().all()


def test_only_the_gradients_that_are_asked_for():
    segments = describe([[(3, [2, 1])]], 7)
    *tensors, gradient = inputs(segments)
    full = with_gradients(lambda *t: prefix_attention(*t, segments, impl="triton"), tensors, gradient)
    for needs in list(itertools.product([False, True], repeat=3))[1:]:
        with poisoned_memory():
            some = with_gradients(lambda *t: prefix_attention(*t, segments, impl="triton"), tensors, gradient, needs)
        for need, mine, all_of_it in zip((True, *needs), some, full, strict=True):
            assert torch.equal(mine, all_of_it) if need else mine is None


def test_any_strides():
    """Projections seen as (R, T, H, D), a head size that is not the fastest axis, an expanded gradient."""
    segments = describe(ROWS[1:], 15)
    q, k, v, _ = inputs(segments, 4, 2)
    expected = with_gradients(lambda *t: prefix_attention(*t, segments, impl="triton"), (q, k, v), torch.ones_like(q))
    fused = torch.cat([t.transpose(1, 2) for t in (q, k, v)], 2).transpose(1, 2)
    views = [fused[:, :4], fused[:, 4:6], v.transpose(2, 3).contiguous().transpose(2, 3)]
    out = prefix_attention(*(t.requires_grad_() for t in views[:1]), *views[1:], segments, impl="triton")
    assert torch.equal(out, expected[0]) and out.transpose(1, 2).is_contiguous()
    (dq,) = torch.autograd.grad(out.sum(), views[:1])
    assert torch.equal(dq, expected[1])


def test_the_operators_as_torch_sees_them():
    from vpgtrans.kernels.prefix_attention import _backward, _forward

    segments = describe([[(2, [2, 1])]], 6)
    q, k, v, gradient = inputs(segments)
    torch.library.opcheck(_forward, (q, k, v, segments, 0.25), test_utils=("test_schema", "test_faketensor"))
    out, lse = _forward(q, k, v, segments, 0.25)
    for needs in ((True, True, True), (False, True, False)):
        arguments = (gradient, q, k, v, segments, out, lse, 0.25, *needs)
        torch.library.opcheck(_backward, arguments, test_utils=("test_schema", "test_faketensor"))


def test_empty_batches():
    for rows, tokens in ((0, 5), (2, 0)):
        q = torch.zeros(rows, 4, tokens, 8, requires_grad=True)
        k = torch.zeros(rows, 2, tokens, 8)
        out = prefix_attention(q, k, k, torch.zeros(rows, tokens, 4, dtype=torch.int32))
        out.sum().backward()
        assert out.shape == q.shape == q.grad.shape


def test_errors_name_the_argument():
    segments = describe(ROWS, 27)
    q, k, v, _ = inputs(segments, 4, 2)
    for broken, message in (
        ((q[0], k, v, segments), r"queries: expected \(rows, heads, tokens, head size\), got shape \(4, 27, 16\)"),
        ((q, k[:, :, :5], v, segments), r"keys: expected \(2, a divisor of 4, 27, 16\).*has no cache"),
        ((q[:, :3], k, v, segments), r"keys: expected \(2, a divisor of 3"),
        ((q, k, v[:, :1], segments), r"values: expected the keys' shape"),
        ((q, k.double(), v, segments), r"keys: expected torch.float32 on .* got torch.float64"),
        ((q, k, v.to("meta"), segments), r"values: expected torch.float32 on .* got torch.float32 on meta"),
        ((q, k, v, segments.long()), r"segments: expected int32 \(2, 27, 4\)"),
        ((q, k, v, segments[:, :5]), r"segments: .*PackedBatch.segments"),
    ):
        with pytest.raises(ValueError, match=message):
            prefix_attention(*broken)
    with pytest.raises(ValueError, match="scale: expected a positive number, got -1"):
        prefix_attention(q, k, v, segments, scale=-1)
    with pytest.raises(ValueError, match="impl: expected None"):
        prefix_attention(q, k, v, segments, impl="flash")
    with pytest.raises(ValueError, match=r"got 'triton': dtype torch.float64"):
        prefix_attention(q.double(), k.double(), v.double(), segments, impl="triton")


def test_reasons(monkeypatch):
    segments = describe(ROWS, 27)
    q, k, v, _ = inputs(segments, 4, 2)
    assert prefix_attention_unsupported_reason(q, k, v, sliding_window=27) is None
    assert "sliding_window 26 is shorter" in prefix_attention_unsupported_reason(q, k, v, sliding_window=26)
    assert "softcap 50" in prefix_attention_unsupported_reason(q, k, v, softcap=50.0)
    assert "dropout 0.1" in prefix_attention_unsupported_reason(q, k, v, dropout=0.1)
    assert "head size 12" in prefix_attention_unsupported_reason(q[..., :12], k[..., :12], v[..., :12])
    wide = torch.empty(1, 1, 1, 264)
    assert "up to 256" in prefix_attention_unsupported_reason(wide, wide, wide)
    vast = torch.empty(1, 1, 1, 8, device="meta").expand(1, 2**14, 2**14, 8)
    assert "2**31" in prefix_attention_unsupported_reason(vast, vast, vast)
    many = torch.empty(70000, 1, 1, 8)
    assert "65,535" in prefix_attention_unsupported_reason(many, many, many)
    assert "NVIDIA" in prefix_attention_unsupported_reason(*(t.to("meta") for t in (q, k, v)))
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert prefix_attention_unsupported_reason(q, k, v) == "the tensors are on the CPU"
        assert torch.equal(prefix_attention(q, k, v, segments), reference_prefix_attention(q, k, v, segments))


def test_launch_settings():
    assert [padded_head_size(d) for d in (8, 64, 80, 96, 128, 136, 256)] == [16, 64, 128, 128, 128, 256, 256]
    for architecture, head, dtype in itertools.product((80, 90), (64, 80, 128, 256), (torch.bfloat16, torch.float32)):
        for stage in ("forward", "query_gradient", "key_gradient"):
            config = launch_config(stage, head, dtype, architecture)
            held, staged = config.block_rows, config.block_keys
            if stage == "key_gradient":
                held, staged = staged, held
            tiles = (1 if stage == "forward" else 2) * held + 2 * config.stages * staged
            assert tiles * padded_head_size(head) * dtype.itemsize <= SHARED_KIB[architecture] * 1024


def test_compiled_within_budget(compiled_kernels):
    found = compiled_kernels("prefix_attention")
    assert len(found) == 2 * 4
    for kernel in found:
        name = f"{kernel['name']} sm_{kernel['architecture']}: {kernel}"
        assert kernel["registers"] <= 255, name
        assert kernel["spill_bytes"] == 0 and kernel["local_accesses"] == 0, name
        assert kernel["shared_bytes"] <= SHARED_KIB[kernel["architecture"]] * 1024, name
        assert kernel["wgmma" if kernel["architecture"] == 90 else "mma"] > 0, name
