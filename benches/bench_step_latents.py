"""The engine's step with the Q-Former's cross-attention through latents and with keys and values formed, in turns, on the CPU.

bench_step.py has both among many rows and few repeats; what `kernels.qformer_attention: auto` does on the CPU rests on this closer look.
Stage 2, same weights and pairs; losses compared first. Printed: medians, and the median of the ratios of neighbours.
The shape `tiny` only shows that all is well.

    python benches/bench_step_latents.py [--shape tiny] [--rounds 9] [--threads N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

import torch
from step_peers import SHAPES, Settings, make_blip2, make_peer
from timing import about

CASES = ((5, "vision cache"), (5, "live"), (1, "vision cache"))  # captions an image, where features come from
FORMS = {"latents": "engine", "formed": "engine, formed"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes = [name for name, shape in SHAPES.items() if "cpu" in shape.pairs]
    parser.add_argument("--shape", choices=shapes, default="tiny")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = Settings(options.shape, "cpu", torch.float32, options.threads)
    base = make_blip2(settings)
    peers = {form: make_peer(name, settings, base) for form, name in FORMS.items()}
    found = about(
        "step_latents", "cpu", shape=options.shape, threads=options.threads, rounds=options.rounds, results=[]
    )
    for captions, source in CASES:
        losses = {}
        for form, peer in peers.items():
            peer.load(2, captions)
            losses[form] = peer.check(source)["loss"]
            peer.step(source)
        if abs(losses["latents"] / losses["formed"] - 1) > 1e-4:
            print(f"bench_step_latents.py: {captions} captions, {source}: losses differ: {losses}", file=sys.stderr)
            return 1
        times: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
        for number in range(options.rounds):
            for form in FORMS if number % 2 else reversed(FORMS):
                times[form].append(peers[form].step(source))
        pairs = list(zip(times["formed"], times["latents"], strict=True))
        row = {
            "captions": captions, "source": source,
            **{f"{form}_s": statistics.median(t[0] for t in of_form) for form, of_form in times.items()},
            "times": statistics.median(f[0] / n[0] for f, n in pairs), "times_cpu": statistics.median(f[1] / n[1] for f, n in pairs),
            "each_cpu": [round(f[1] / n[1], 3) for f, n in pairs],
        }  # fmt: skip
        found["results"].append(row)
        print(
            f"{captions} captions an image, {source:12}: latents {row['latents_s']:.3f} s, formed {row['formed_s']:.3f} s: "
            f"{row['times']:.3f} times by the clock, {row['times_cpu']:.3f} by CPU seconds",
            flush=True,
        )
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
