"""Attention in packed rows: ours, SDPA behind the dense mask, FlexAttention, and variable-length attention with the prefix repeated.

Rows are packed as in training, from captions of about 13 tokens behind 32 visual ones. Correctness to float64 first, then time (interleaved,
medians) of forward and of forward and backward, TFLOP/s of visible pairs, share of the floor (every tensor once at the measured copy
bandwidth) and, on a GPU, peak memory above the operands. "Keys repeated" are the recipe's back ends, which take the same rows and unpack them on
the way. Peers merely "repeated" attend over more tokens, which the rest of the model would have to compute too: `tokens` says how many times.

    python benches/bench_prefix_attention.py [--device cpu|cuda] [--repeats N] [--out FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timing import about, copy_bandwidth, device_title, interleaved_ms, peak_mib
from torch import Tensor

from vpgtrans.engine.data.packing import CaptionData, Group, PackedBatch, pack_update
from vpgtrans.engine.models.attention_back_ends import attend, back_end_unsupported_reason, layout_for
from vpgtrans.kernels.checks import assert_within_budget
from vpgtrans.kernels.prefix_attention import (
    dense_mask,
    prefix_attention,
    prefix_attention_unsupported_reason,
    reference_prefix_attention,
)

VISUAL = 32
# name, rows, tokens of a row, captions an image, heads, key heads, head size
CUDA_SHAPES = (
    ("OPT-6.7B", 8, 2048, 5, 32, 32, 128),
    ("Qwen3-8B", 8, 2048, 5, 32, 8, 128),
    ("OPT-2.7B", 8, 2048, 5, 32, 32, 80),
    ("OPT-6.7B, one caption", 8, 2048, 1, 32, 32, 128),
    ("OPT-6.7B, short rows", 16, 512, 5, 32, 32, 128),
    ("Gemma-2B", 8, 2048, 5, 8, 1, 256),
    ("OPT-1.3B", 8, 2048, 5, 32, 32, 64),
)
CPU_SHAPES = (
    ("demo", 4, 256, 5, 4, 4, 32),
    ("grouped heads", 2, 512, 5, 4, 2, 64),
    ("one caption", 2, 512, 1, 4, 4, 64),
)


@dataclass
class Peer:
    """leaves: queries, keys, values in the peer's own layout."""

    run: Callable[..., Tensor]
    leaves: list[Tensor]

    def __post_init__(self) -> None:
        self.leaves = [t.detach().requires_grad_() for t in self.leaves]
        self.gradient = torch.randn_like(self.run(*self.leaves))

    def forward(self) -> None:
        with torch.no_grad():
            self.run(*self.leaves)

    def forward_backward(self) -> list[Tensor]:
        out = self.run(*self.leaves)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.gradient)]


def packed_rows(rows: int, tokens: int, captions: int, seed: int = 0) -> tuple[PackedBatch, list[int]]:
    """The first micro-batch of an update, and the lengths of its captions."""
    rng = np.random.default_rng(seed)
    images = 2 * rows * tokens // (VISUAL + 13 * captions) + 1
    lengths = rng.normal(13, 2.5, (images, captions)).round().clip(8, 30).astype(int).tolist()
    data = CaptionData("bench", [None] * images, [[[1] * n for n in row] for row in lengths])
    groups = [Group(image, 0, tuple(range(captions))) for image in range(images)]
    batch = pack_update(groups, data, VISUAL, tokens, rows, 0, fixed_shape=True)[0]
    segments = batch.segments.view(-1, 4)
    # A caption begins where its own start is reached, prefix and padding have none.
    starts = (segments[:, 2] == torch.arange(len(segments)) % tokens).nonzero().flatten()
    return batch, (segments[starts, 3] - segments[starts, 2]).tolist()


def back_end_peers(segments: Tensor, absent: list[str]) -> dict[str, Callable[..., Tensor]]:
    """What a recipe can name under `attention`: FlexAttention, and sequences whose keys have the prefix repeated, of rows as they are."""
    found: dict[str, Callable[..., Tensor]] = {}
    titles = {"flex": "FlexAttention", "flash": "flash-attn, keys repeated", "xformers": "xformers, keys repeated"}
    for back_end, title in titles.items():
        if reason := back_end_unsupported_reason(back_end, segments.device, torch.bfloat16):
            absent.append(f"{title} ({reason})")
            continue
        layout = layout_for(back_end, segments.cpu(), segments.device)
        found[title] = lambda q, k, v, back_end=back_end, layout=layout: attend(back_end, q, k, v, layout, None)
    return found


def varlen_peers(lengths: list[int], group: int, absent: list[str]) -> dict[str, Callable[..., Tensor]]:
    """Attention over (total tokens, heads, head size), each caption behind a prefix of its own, queries and all."""
    found: dict[str, Callable[..., Tensor]] = {}
    device = torch.device("cuda")
    ends = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=device)
    bounds = (ends, ends, max(lengths), max(lengths))
    if back_end_unsupported_reason("flash", device) is None:
        from flash_attn import flash_attn_varlen_func

        found["flash-attn, repeated"] = lambda q, k, v: flash_attn_varlen_func(q, k, v, *bounds, causal=True)
    if importlib.util.find_spec("torch.nn.attention.varlen"):
        from torch.nn.attention.varlen import varlen_attn

        names = inspect.signature(varlen_attn).parameters  # is_causal became window_size in torch 2.11
        causal = {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
        if group > 1 and "enable_gqa" in names:
            causal["enable_gqa"] = True
        if group == 1 or "enable_gqa" in names:
            found["torch varlen, repeated"] = lambda q, k, v: varlen_attn(q, k, v, *bounds, **causal)
    else:
        absent.append("torch's varlen_attn")
    if back_end_unsupported_reason("xformers", device) is None:
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

        bias = BlockDiagonalCausalMask.from_seqlens(lengths)

        def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k, v))
            return memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]

        found["xformers, repeated"] = xformers
    return found


def pairs_peer(lengths: list[int], heads: int, kv_heads: int, head_size: int, dtype: torch.dtype) -> Peer:
    """On the CPU: SDPA, causal, one pair a row, padded to the longest."""
    rows = [(len(lengths), n, VISUAL + max(lengths), head_size) for n in (heads, kv_heads, kv_heads)]
    leaves = [torch.randn(shape).to(dtype) for shape in rows]
    return Peer(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads), leaves
    )  # fmt: skip


def build_peers(
    device: torch.device, shape: tuple, segments: Tensor, lengths: list[int], absent: list[str]
) -> dict[str, Peer]:
    """What is compared at one shape; `absent` gains what is not installed and what failed."""
    _, rows, tokens, _, heads, kv_heads, head_size = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # As a model's projections lie in memory: (rows, tokens, heads, head size).
    leaves = [
        torch.randn(rows, tokens, n, head_size, device=device, dtype=dtype).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    ]
    mask = dense_mask(segments)
    group = heads // kv_heads

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    made: dict[str, Callable[[], Peer]] = {}
    if device.type == "cuda" and prefix_attention_unsupported_reason(*leaves) is None:
        made["ours"] = lambda: Peer(lambda q, k, v: prefix_attention(q, k, v, segments, impl="triton"), leaves)
    made["SDPA, dense mask"] = lambda: Peer(sdpa, leaves)
    if device.type == "cpu":
        made["SDPA, one pair a row"] = lambda: pairs_peer(lengths, heads, kv_heads, head_size, dtype)
    for name, run in back_end_peers(segments, absent).items():
        made[name] = lambda run=run: Peer(run, leaves)
    if device.type == "cuda":
        repeated = [VISUAL + n for n in lengths]
        for name, run in varlen_peers(repeated, group, absent).items():
            made[name] = lambda run=run: Peer(
                run, [torch.randn(sum(repeated), n, head_size, device=device, dtype=dtype) for n in (heads, kv_heads, kv_heads)]
            )  # fmt: skip
    found = {}
    for name, make in made.items():
        try:
            found[name] = make()
            found[name].forward_backward()
        except Exception as error:  # a peer that cannot run must not cost the others' numbers
            if name == "ours":
                raise
            found.pop(name, None)
            absent.append(f"{name} at {shape[0]}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
    return found


def check(peer: Peer, segments: Tensor) -> None:
    """Ours on the first row against float64, with the reference in the same dtype as the measure."""
    first, leaves, gradient = segments[:1], [t.detach()[:1] for t in peer.leaves], peer.gradient[:1]

    def run(kind: str, tensors: list[Tensor], weights: Tensor) -> list[Tensor]:
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = (
            reference_prefix_attention(*tensors, first)
            if kind == "reference"
            else prefix_attention(*tensors, first, impl=kind)
        )
        return [out.detach(), *torch.autograd.grad(out, tensors, weights)]

    exact = run("reference", [t.double() for t in leaves], gradient.double())
    plain = run("reference", leaves, gradient)
    for name, *values in zip(("out", "dq", "dk", "dv"), run("triton", leaves, gradient), exact, plain, strict=True):
        assert_within_budget(name, *values)


def measure(device: torch.device, shape: tuple, repeats: int, bandwidth: float) -> dict:
    torch.manual_seed(0)
    _, rows, tokens, captions, heads, kv_heads, head_size = shape
    batch, lengths = packed_rows(rows, tokens, captions)
    segments = batch.segments.to(device)
    visible = int(dense_mask(batch.segments).sum())
    absent: list[str] = []
    peers = build_peers(device, shape, segments, lengths, absent)
    if "ours" in peers:
        check(peers["ours"], segments)
    parts = ("forward", "forward_backward")
    calls = {(name, part): getattr(peer, part) for name, peer in peers.items() for part in parts}
    times = interleaved_ms(device, calls, repeats)
    itemsize = peers["SDPA, dense mask"].leaves[0].element_size()
    tensor_bytes = rows * tokens * head_size * itemsize
    # Forward q, k, v, out; backward q, k, v, out, dout, dq, dk, dv: each once.
    moved = {"forward": tensor_bytes * (2 * heads + 2 * kv_heads)}
    moved["forward_backward"] = moved["forward"] + tensor_bytes * (4 * heads + 4 * kv_heads)
    flop = {"forward": 4 * visible * heads * head_size, "forward_backward": 14 * visible * heads * head_size}
    results = {}
    for name in peers:
        results[name] = row = {"tokens": round(peers[name].leaves[0].numel() / (rows * tokens * heads * head_size), 2)}
        for part in parts:
            ms = times[name, part]
            row[part] = {
                "ms": round(ms, 4), "gb_per_s": round(moved[part] / ms / 1e6, 1), "tflop_per_s": round(flop[part] / ms / 1e9, 3),
                "share_of_floor": round(1e3 * moved[part] / bandwidth / ms, 3),
                "times_sdpa": round(ms / times["SDPA, dense mask", part], 3),
            }  # fmt: skip
        if device.type == "cuda":
            row["peak_mib"] = peak_mib(peers[name].forward_backward)
    sizes = dict(
        zip(("rows", "tokens", "captions_an_image", "heads", "key_heads", "head_size"), shape[1:], strict=True)
    )
    return sizes | {"visible_share": round(visible / (rows * tokens**2), 4), "not_measured": absent, "peers": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write one JSON object to a file")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    described = device_title(device)
    unit = "ms" if device.type == "cuda" else "CPU ms"
    bandwidth = copy_bandwidth(device)
    print(
        f"prefix_attention, {described}, copies at {bandwidth / 1e9:.0f} GB/s, median of {options.repeats} interleaved runs"
    )
    head = about("prefix_attention", device, repeats=options.repeats)
    found: dict = {}
    for shape in CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES:
        result = found[shape[0]] = measure(device, shape, options.repeats, bandwidth)
        print(
            f"{shape[0]}: {shape[1]} rows of {shape[2]}, {shape[3]} captions an image, {shape[4]} heads on {shape[5]} of {shape[6]}; ",
            end="",
        )
        print(f"{100 * result['visible_share']:.1f} % of the pairs are visible")
        for name, row in result["peers"].items():
            parts = ", ".join(
                f"{part.replace('_', ' + ')} {row[part]['ms']:8.3f} {unit} ({row[part]['times_sdpa']:.3f} x SDPA's, "
                f"{100 * row[part]['share_of_floor']:.1f} % of the floor)"
                for part in ("forward", "forward_backward")
            )
            memory = f", {row['peak_mib']:.0f} MiB" if "peak_mib" in row else ""
            print(f"  {name:24} {parts}{memory}, {row['tokens']:.2f} x the tokens")
        for name in result["not_measured"]:
            print(f"  not measured: {name}")
        if options.out:
            options.out.write_text(json.dumps(head | {"results": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
