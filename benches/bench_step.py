"""One optimiser step of the engine against transformers' BLIP-2 in a plain loop (a), the same tuned (b), and the authors' habits (c).

step_peers.py says what each of them does. All have the same random weights and the same captions, whose lengths are COCO's. For every number
of captions an image, loss and gradients (without dropout) are compared first; where they differ, nothing is timed. Every peer is timed at the best
of a few micro-batches, with one step of each after the other; medians. The three peers have a row of their own for every pair, so that how
pairs share images changes nothing for them: they are timed on the images with the most captions, on the CPU, whose rate changes
within minutes, again between the engine's steps on others.

    x (a), x (b), x (c)   seconds a pair of that peer over those of the row, by the clock
    of floor              what the row's FLOPs take at the rate of a square matrix product, measured between the steps, over what it took
    padding               share of the language model's tokens that nobody reads
    above MiB             peak memory of a step above weights and AdamW's moments: on a GPU torch's own count; on the CPU the resident memory of the
                          peer's process, where each has one
    noise                 the slowest step that counted over the fastest

CPU s is the time of the process by the number of its threads: what the clock would show, were nothing else running.

    python benches/bench_step.py [--shape NAME ...] [--device cpu|cuda] [--dtype fp32|bf16] [--captions N ...] [--repeats N] [--quick]
        [--threads N] [--limit-s S] [--one-process] [--out FILE]

Without arguments: the shape `tiny` on the CPU, which only shows that all is well; on a GPU vl_llama_7b, blip2 and exploration.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from step_peers import SHAPES, Peer, Remote, Settings, make_blip2, make_peer
from timing import about, timed_ms

# (a), (b), (c)
PEERS = ("transformers", "tuned", "reference")
LETTERS = dict(zip(PEERS, "abc", strict=True))
# Relative differences that rounding makes: of the loss, of the norms of gradients.  Left in float32 by a factor of ten.
TOLERANCES = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (5e-3, 5e-2)}
FP8_TOLERANCE = (5e-2, 0.5)
EPOCHS = (1, 3, 10)
RATE_SIZE = {"cpu": 2048, "cuda": 8192}
# Pairs of the paper's scaled-up run by captions an image (recipes/opt_2.7b_to_6.7b.yaml): stage 1 is COCO, with 5, and SBU, with 1; stage 2 by
# sampling weight COCO 0.1, Visual Genome 0.2, with about 8, and LAION-COCO 0.7, with 1.
STAGE_1_PAIRS = {5: 566_747, 1: 860_253}
STAGE_2_PAIRS = {5: 1_237_248, 8: 2_474_496, 1: 8_660_736}


class PeersDiffer(RuntimeError):
    """A peer computes something else than transformers' plain loop."""


def fastest_dtype() -> torch.dtype:
    """Of the CPU's matrix products: bf16 where it has instructions for it."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(512, 512).to(dtype) for _ in range(2))
        rates[dtype] = min(timed_ms("cpu", lambda a=a, b=b: a @ b) for _ in range(3))
    return min(rates, key=rates.get)


def make_peers(names: Sequence[str], settings: Settings, one_process: bool) -> dict[str, Peer]:
    """On the CPU each in a process of its own; on a GPU they share the frozen weights, but for the tuned one: liger-kernel changes modules of
    transformers for the whole process."""
    shared = make_blip2(settings) if one_process or settings.device == "cuda" else None
    peers: dict[str, Any] = {}
    for name in names:
        is_apart = not one_process and (settings.device == "cpu" or name == "tuned")
        peers[name] = Remote(name, settings) if is_apart else make_peer(name, settings, shared)
    return peers


def compare(found: dict[str, float], wanted: dict[str, float], what: str, settings: Settings) -> None:
    """Raises PeersDiffer where loss or gradients are further from transformers' than rounding takes them."""
    loss_tolerance, gradient_tolerance = FP8_TOLERANCE if "fp8" in what else TOLERANCES[settings.dtype]
    for name, value in found.items():
        if name in ("check_s", "flops"):
            continue
        tolerance = loss_tolerance if name == "loss" else gradient_tolerance
        difference = abs(value / wanted[name] - 1)
        if not difference <= tolerance:
            kind = name if name == "loss" else f"norm of the gradient of {name}"
            raise PeersDiffer(
                f"{what}: {kind}: expected {wanted[name]:.6g} as transformers' plain loop has it, within {tolerance:g} of it, got {value:.6g}; "
                "nothing is timed"
            )


def candidates(name: str, settings: Settings, quick: bool, best: dict[str, dict]) -> list[dict[str, Any]]:
    """Settings of a peer that are tried."""
    shape, device = settings.sizes, settings.device
    if name.startswith("engine"):
        found = [{"row_tokens": tokens, "rows": rows} for tokens, rows in shape.engine_rows[device]]
    elif name == "transformers" or device == "cuda":
        found = [{"rows": rows} for rows in shape.peer_rows[device]]
    else:  # on the CPU a step takes long, and these differ from `transformers` in nothing that rows decide
        found = [dict(best["transformers"])]
    if quick:
        found = found[:1]
    if name == "tuned":
        compiling = (False,) if quick or settings.shape == "tiny" else (False, True)
        found = [{**s, "compiled": c} for s in found for c in compiling]
    return found


class Bench:
    """One shape on one device."""

    def __init__(self, settings: Settings, peers: dict[str, Peer], captions: Sequence[int], repeats: int, quick: bool):
        self.settings, self.peers, self.repeats, self.quick = settings, peers, repeats, quick
        self.captions = sorted(captions, key=lambda n: n != 5)  # the peers are timed with the first
        self.best: dict[str, dict[str, Any]] = {}
        self.wanted: dict[int, dict[str, float]] = {}
        self.tried: list[dict[str, Any]] = []
        self.engines = [name for name in peers if name.startswith("engine")]

    def run(self) -> dict[str, Any]:
        """Both stages; choice of the micro-batches first.  Raises PeersDiffer before anything is timed."""
        for name in self.peers:
            self._choose(name)
        rows = [row for stage in (2, 1) for row in self._stage(stage)]
        return {
            "shape": self.settings.shape, "dtype": str(self.settings.dtype), "threads": self.settings.threads,
            "repeats": self.repeats, "settings": self.best, "tried": self.tried, "rows": rows,
        }  # fmt: skip

    def _choose(self, name: str) -> None:
        """The fastest of a peer's settings in stage 2, each compared first."""
        peer, times = self.peers[name], []
        for setting in candidates(name, self.settings, self.quick, self.best):
            try:
                peer.load(2, self.captions[0], **setting)
                step_s = self._check(name, self.captions[0])["check_s"]
                # On the CPU a step takes long and the first costs no more than others, but for compiling.
                if self.settings.device == "cuda" or setting.get("compiled"):
                    step_s = self._check(name, self.captions[0])["check_s"]
            except (RuntimeError, torch.OutOfMemoryError) as error:
                if isinstance(error, PeersDiffer) or (name == "transformers" and not times):
                    raise
                self.tried.append({"peer": name, **setting, "failed": str(error)[-500:]})
                continue
            finally:
                peer.free()
            self.tried.append({"peer": name, **setting, "step_s": step_s})
            times.append((step_s, setting))
        if not times:
            raise RuntimeError(f"{name}: none of its settings ran: {self.tried[-1]['failed']}")
        self.best[name] = min(times, key=lambda t: t[0])[1]

    def _check(self, name: str, captions: int, source: str = "live") -> dict[str, float]:
        """Compare the pairs that are loaded with those of transformers' plain loop; what `Peer.check` gives."""
        found = self.peers[name].check(source, counts=name != "tuned")  # compiled blocks cannot be counted
        if name == "transformers":
            self.wanted.setdefault(captions, found)
        compare(found, self.wanted[captions], f"{name}, {captions} captions an image, {source}", self.settings)
        return found

    def _stage(self, stage: int) -> list[dict[str, Any]]:
        first, rows, timed = self.captions[0], [], {}
        for name in PEERS:
            loaded = self.peers[name].load(stage, first, **self.best[name])
            flops = self._check(name, first)["flops"] or timed["transformers", first, "live"]["flops"]
            timed[name, first, "live"] = {**loaded, "flops": flops}
        for captions in self.captions[1:]:
            if captions not in self.wanted:
                self.peers["transformers"].load(stage, captions, **self.best["transformers"])
                self._check("transformers", captions)
                self.peers["transformers"].load(stage, first, **self.best["transformers"])
        found: dict[tuple, dict[str, Any]] = {}
        for captions in self.captions:
            again = timed if captions == first or self.settings.device == "cpu" else {}
            found |= self._rounds(stage, captions, {(n, captions, s): dict(row) for (n, _, s), row in again.items()})
        for (name, captions, source), row in found.items():
            rows.append({"stage": stage, "captions": captions, "peer": name, "source": source, **row})
        self._ratios(rows)
        return rows

    def _rounds(self, stage: int, captions: int, timed: dict[tuple, dict[str, Any]]) -> dict[tuple, dict[str, Any]]:
        """Rows of the engine at so many captions an image, and of the peers in `timed`; interleaved."""
        rows = dict(timed)
        for name in self.engines:
            if name != "engine" and self.settings.device == "cpu" and captions != self.captions[0]:
                continue  # minutes for what changes little
            peer = self.peers[name]
            loaded = peer.load(stage, captions, **self.best[name])
            for source in peer.sources[: 3 if stage == 1 else 2]:
                flops = self._check(name, captions, source)["flops"]
                # A GPU's kernels are not counted: the arithmetic is that of torch's operations.
                on_cpu = self.settings.device == "cpu"
                flops = flops if on_cpu or name == "engine" else rows["engine", captions, source]["flops"]
                rows[name, captions, source] = {**loaded, "flops": flops}
        runs: dict[Any, Any] = {key: lambda key=key: self.peers[key[0]].step(key[2]) for key in rows}
        engine, size = self.peers["engine"], 512 if self.settings.shape == "tiny" else RATE_SIZE[self.settings.device]
        runs["rate"] = lambda: engine.rate(size)
        if stage == 1:
            runs |= {("build", what): lambda what=what: engine.build(what) for what in engine.sources[1:]}
        times: dict[Any, list] = {key: [] for key in runs}
        for key, run in runs.items():
            # On the CPU the comparison before was warm-up enough.
            if self.settings.device == "cuda" or key == "rate":
                run()
        for _ in range(self.repeats):
            for key, run in runs.items():
                times[key].append(run())
        rate = [2 * size**3 / statistics.median(t[at] for t in times["rate"]) for at in (0, 1)]
        for key, row in rows.items():
            self._measure(key, row, times[key], rate)
        if stage == 1:
            build_s = {what: statistics.median(t[0] for t in times["build", what]) for what in engine.sources[1:]}
            for (_, _, source), row in rows.items():
                row["build_s"] = build_s.get(source)
        return rows

    def _measure(self, key: tuple, row: dict[str, Any], times: list[tuple[float, float]], rate: list[float]) -> None:
        name, _, source = key
        peer = self.peers[name]
        step_s, cpu_s = (statistics.median(t[at] for t in times) for at in (0, 1))
        clock = [t[0] for t in times]
        flops = row.pop("flops")
        row |= {
            "step_s": step_s, "cpu_s": cpu_s, "noise": max(clock) / min(clock), "pairs_per_s": row["pairs"] / step_s,
            "tflop": flops / 1e12, "matmul_tflop_s": rate[0] / 1e12, "floor_s": flops / rate[0],
            "share_of_floor": flops / rate[0] / step_s, "share_of_floor_cpu": flops / rate[1] / cpu_s,
            "moments_mib": peer.moments_mib(),
        }  # fmt: skip
        if self.settings.device == "cuda" or isinstance(peer, Remote):
            row["above_mib"] = peer.peak_mib(source)
        peer.free()

    def _ratios(self, rows: list[dict[str, Any]]) -> None:
        """Times of the peers over those of each row, a pair; for stage 1 also with the cache built first, over some epochs.

        The peers' steps are those between which the row was timed, where there are such.
        """
        timed = {(row["captions"], row["peer"]): row for row in rows if row["peer"] in PEERS}
        for row in rows:
            peers = {name: timed.get((row["captions"], name)) or timed[self.captions[0], name] for name in PEERS}
            for name, peer in peers.items():
                per_pair = row["pairs"] / peer["pairs"]
                row[f"times_{name}"] = per_pair * peer["step_s"] / row["step_s"]
                row[f"times_{name}_cpu"] = per_pair * peer["cpu_s"] / row["cpu_s"]
                if row.get("build_s"):
                    row[f"times_{name}_with_building"] = {
                        epochs: per_pair * epochs * peer["step_s"] / (row["build_s"] + epochs * row["step_s"])
                        for epochs in EPOCHS
                    }


def project_hours(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Hours on one such device for the 13.8 M pairs of the paper's scaled-up run, both stages, all encoded live, from each row's pairs/s.

    The peers' rate does not depend on captions an image.  Nothing where a number of captions was not measured.
    """
    hours = {}
    for name in dict.fromkeys(row["peer"] for row in rows):
        total = 0.0
        for stage, mix in ((1, STAGE_1_PAIRS), (2, STAGE_2_PAIRS)):
            for captions, pairs in mix.items():
                rates = [
                    row["pairs_per_s"] for row in rows
                    if (row["peer"], row["stage"], row["source"]) == (name, stage, "live") and (row["captions"] == captions or name in PEERS)
                ]  # fmt: skip
                total += pairs / rates[0] / 3600 if rates else float("nan")
        if total == total:
            hours[name] = total
    return hours


def print_table(result: dict[str, Any]) -> None:
    print(f"\n{result['shape']}, {result['dtype']}, {result['threads']} threads, median of {result['repeats']}")
    for name, setting in result["settings"].items():
        print(f"  {name}{' (' + LETTERS[name] + ')' if name in LETTERS else ''}: best of those tried {setting}")
    for tried in result["tried"]:
        if "failed" in tried:
            print(f"  did not run: {tried}")
    print(
        f"{'stage':5} {'cap.':>4}  {'':30} {'step s':>8} {'CPU s':>8} {'pairs/s':>8} {'x (a)':>6} {'x (b)':>6} {'x (c)':>6} {'of floor':>8} "
        f"{'padding':>7} {'above MiB':>9} {'noise':>5}"
    )
    for row in result["rows"]:
        label = row["peer"] + ("" if row["source"] == "live" else f", {row['source']}")
        captions = row["captions"]
        ratios = " ".join(f"{row[f'times_{name}']:6.2f}" for name in PEERS)
        peak = f"{row['above_mib']:9.0f}" if "above_mib" in row else f"{'':9}"
        print(
            f"{row['stage']:5} {captions:>4}  {label:30} {row['step_s']:8.3f} {row['cpu_s']:8.3f} {row['pairs_per_s']:8.2f} {ratios} "
            f"{row['share_of_floor']:8.0%} {row['padding']:7.0%} {peak} {row['noise']:5.2f}"
        )
    for row in result["rows"]:
        if built := row.get("times_transformers_with_building"):
            tuned = row["times_tuned_with_building"]
            told = ", ".join(f"{epochs} epochs {built[epochs]:.2f} ({tuned[epochs]:.2f})" for epochs in built)
            print(
                f"stage 1, {row['captions']} captions, {row['peer']}, {row['source']}, building it counted in ({row['build_s']:.3f} s for these "
                f"images), x (a) (and (b)), reckoned from the measured parts: {told}"
            )
    for name, hours in result.get("hours_of_the_scaled_up_run", {}).items():
        print(f"13.8 M pairs of the scaled-up run, {name}: {hours:.1f} hours of this device (reckoned from pairs/s)")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="of the model; default: see above")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU, what multiplies faster on the CPU"
    )
    parser.add_argument("--captions", nargs="+", type=int, metavar="N", help="an image; default 1 5, on a GPU 1 5 8")
    parser.add_argument(
        "--repeats", type=int, metavar="N", help="steps that count; default 2, on a GPU 9, with --quick 1"
    )
    parser.add_argument("--quick", action="store_true", help="one setting a peer, nothing compiled, one step")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="on the CPU; default: all cores"
    )
    parser.add_argument("--limit-s", type=float, default=float("inf"), metavar="S", help="start no shape after so long")
    parser.add_argument("--one-process", action="store_true", help="all peers in one: no peak memory on the CPU")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the results as JSON")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    options.shape = options.shape or (["vl_llama_7b", "blip2", "exploration"] if on_gpu else ["tiny"])
    for shape in options.shape:
        if options.device not in SHAPES[shape].pairs:
            parser.error(f"--shape {shape}: expected --device cuda, where it fits, got {options.device}")
    options.captions = options.captions or ([1, 5, 8] if on_gpu else [1, 5])
    options.repeats = options.repeats or (1 if options.quick else 9 if on_gpu else 2)
    return options


def versions() -> dict[str, str | None]:
    found = {}
    for package in ("transformers", "liger-kernel"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options, began = parse(arguments), time.monotonic()
    on_gpu = options.device == "cuda"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    dtype = dtypes[options.dtype] if options.dtype else torch.bfloat16 if on_gpu else fastest_dtype()
    found = about("step", options.device, **versions(), results=[])
    print(f"one optimiser step on {found['device']}, {dtype}")
    # On the CPU the Q-Former's latents are the one operation of kernels/ that pays.
    names = [*PEERS, "engine", *(("engine, kernels", "engine, fp8") if on_gpu else ("engine, formed",))]
    for shape in options.shape:
        if time.monotonic() - began > options.limit_s:
            print(f"{shape}: not measured: {options.limit_s:.0f} s are over")
            continue
        threads = 1 if shape == "tiny" else options.threads
        settings = Settings(shape, options.device, dtype, threads)
        torch.set_num_threads(threads)
        peers = make_peers(names, settings, options.one_process)
        try:
            result = Bench(settings, peers, options.captions, options.repeats, options.quick).run()
        except PeersDiffer as fault:
            print(f"bench_step.py: {fault}", file=sys.stderr)
            return 1
        finally:
            for peer in peers.values():
                if isinstance(peer, Remote):
                    peer.close()
            del peers
        if shape == "vl_llama_7b":
            result["hours_of_the_scaled_up_run"] = project_hours(result["rows"])
        found["results"].append(result)
        print_table(result)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
