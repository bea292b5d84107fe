"""Everything that needs a GPU, in parts: correctness first, then time. What `make gpu` runs once the package is built.

    python benches/gpu.py --out DIR [--part NAME ...] [--redo] [--limit-s 480]

Parts, the most telling first: the machine (what was built, copy bandwidth, matmul rates), the whole optimiser step at the sizes of VL-LLaMA-7B,
BLIP-2 and the exploration (`step`), then for each operation of kernels/ its tests on the GPU and, only if they pass, its bench at the recipes'
shapes; last the miniature world (`world` makes its parts) for some hundred updates in float32, bf16, bf16 with our kernels, and FP8, whose loss
curves are compared. Each part has a time limit and leaves DIR/PART.json; a part that is there and ended well is passed over, so that a run that
was cut off goes on, inside `world` and `training` too. A table is printed last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from timing import copy_bandwidth, matmul_rate, median_ms

ROOT = Path(__file__).resolve().parents[1]
# Most telling first: what the LLM's and the ViT's time hangs on, then the Q-Former, then what is small.
OPERATIONS = (
    "prefix_attention", "linear_cross_entropy", "frozen_linear", "qformer_attention", "adamw_step", "prompt_assembly", "projector_converter",
)  # fmt: skip
PARTS = ("machine", "step", *OPERATIONS, "world", "training")
MORE_TESTS = {
    "prefix_attention": ["tests/test_prefix_interface.py", "tests/test_attention_back_ends.py"],
    "frozen_linear": ["tests/test_quantise_frozen.py"],
    "adamw_step": ["tests/test_optimizer_implementation.py"],
}
KERNELS = (
    "prefix_attention",
    "qformer_attention",
    "projector_converter",
    "prompt_assembly",
    "linear_cross_entropy",
    "adamw_step",
)
ARMS = {
    "fp32": ["precision=fp32"],
    "bf16": ["precision=bf16"],
    "bf16 with kernels": ["precision=bf16", *(f"kernels.{name}=kernel" for name in KERNELS)],
    "fp8 with kernels": ["precision=bf16", *(f"kernels.{name}=kernel" for name in (*KERNELS, "frozen_linear"))],
}
TRAINING = [
    "device=cuda", "stages.0.pairs=1280", "stages.1.pairs=11008", "stages.1.eval_every_pairs=1376", "evaluation.generate_images=50",
    "evaluation.loss_images=100",
]  # fmt: skip
# Without a GPU: the way there and back, in a few updates.
REHEARSAL = [
    "device=cpu", "stages.0.pairs=128", "stages.1.pairs=256", "stages.1.eval_every_pairs=128", "evaluation.generate_images=4",
    "evaluation.loss_images=10",
]  # fmt: skip
SOURCE_REHEARSAL = ["stages.0.pairs=512", "stages.0.eval_every_pairs=256", "evaluation.generate_images=4"]
# What the arms start from, in the order in which it is made: recipe under recipes/demo, command.
WORLD = {
    "vision": ["pretrain", "vision"],
    "lm_source": ["pretrain", "lm"],
    "lm_target": ["pretrain", "lm"],
    "vpg": ["pretrain", "vpg"],
    "source": ["train"],
}
SCENES = ["scenes", "artifacts/demo/world", "--train=3000", "--source=3000", "--val=200", "--text=8000"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="one JSON file a part; default: %(default)s"
    )
    parser.add_argument(
        "--part", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--redo", action="store_true", help="also parts that ended well before")
    parser.add_argument(
        "--limit-s", type=int, default=480, metavar="S", help="time limit of a part; default: %(default)s"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="without a GPU: go through all parts as far as that is possible"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.rehearse:
        print(
            "gpu.py: expected a CUDA device, torch sees none; --rehearse goes through the parts without one",
            file=sys.stderr,
        )
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in options.part:
        path = options.out / f"{part}.json"
        if path.is_file() and json.loads(path.read_text()).get("ok") and not options.redo:
            print(f"{part}: done before, {path}", flush=True)
            continue
        if options.redo:
            shutil.rmtree(options.out / part, ignore_errors=True)  # what `world` and `training` have ended
        began = time.monotonic()
        result = _run_part(part, options.out, began + options.limit_s)
        result = {
            "part": part,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - began, 1),
            **result,
        }
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(
            f"{part}: {'ok' if result['ok'] else 'FAILED, see ' + str(options.out / (part + '.log'))} in {result['seconds']:.0f} s",
            flush=True,
        )
        failed += [] if result["ok"] else [part]
    _print_table(options.out)
    return 1 if failed else 0


def _run_part(part: str, out: Path, deadline: float) -> dict[str, Any]:
    if part == "machine":
        return _machine(out, deadline)
    if part == "world":
        return _world(out, deadline)
    if part == "training":
        return _training(out, deadline)
    tests = [f"tests/test_{'bench_' if part == 'step' else ''}{part}.py", *MORE_TESTS.get(part, [])]
    log = out / f"{part}.log"
    code = _call([sys.executable, "-P", "-m", "pytest", "-q", "-x", *tests], log, deadline)
    if code != 0:
        return {"ok": False, "tests": code, "bench": "not run: the tests failed", "end_of_log": _tail(log)}
    bench = out / f"bench_{part}.json"
    command = [sys.executable, f"benches/bench_{part}.py", "--out", str(bench.resolve())]
    if part == "step":  # a shape that is started late would be cut off; on the CPU, in a rehearsal, it takes `tiny`
        command += ["--limit-s", str(round(0.6 * (deadline - time.monotonic())))]
    code = _call(command, log, deadline)
    found = json.loads(bench.read_text()) if bench.is_file() else None
    return {
        "ok": code == 0 and found is not None,
        "tests": 0,
        "bench": found,
        "end_of_log": None if code == 0 else _tail(log),
    }


def _call(command: list[str], log: Path, deadline: float) -> int:
    """Exit code, 124 past the deadline; output is added to `log`."""
    left = deadline - time.monotonic()
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        try:
            return subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=max(1.0, left), check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return 124


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def _machine(out: Path, deadline: float) -> dict[str, Any]:
    """What is there and how fast it can be at best; committed under benches/results/, it is what `vpgtrans plan` reckons with."""
    code = _call([sys.executable, "-P", "-m", "vpgtrans.engine.cli", "doctor"], out / "machine.log", deadline)
    about: dict[str, Any] = {"ok": code == 0, "torch": torch.__version__, "bench": "device", "device": "cpu"}
    if not torch.cuda.is_available():
        return about
    title = torch.cuda.get_device_name()
    about |= {"device": _plan_name(title), "title": title}
    about["copy_gb_s"] = round(copy_bandwidth("cuda") / 1e9, 1)
    about["matmul_tflops_bf16"] = round(matmul_rate("cuda") / 1e12, 1)
    about["matmul_tflops_fp32"] = round(matmul_rate("cuda", dtype=torch.float32) / 1e12, 1)
    if torch.cuda.get_device_capability() >= (9, 0):
        scale_a, scale_b = torch.ones(8192, 1, device="cuda"), torch.ones(1, 8192, device="cuda")
        a8, b8 = (torch.randn(8192, 8192, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
        multiply = lambda: torch._scaled_mm(a8, b8.t(), scale_a, scale_b, out_dtype=torch.bfloat16)  # noqa: E731
        about["matmul_tflops_fp8_rowwise"] = round(2e3 * 8192**3 / median_ms("cuda", multiply) / 1e12, 1)
    return about


def _plan_name(title: str) -> str:
    """The name by which `vpgtrans plan --gpu` knows a device; its own where plan does not know it."""
    if "A100" in title:
        return "a100-80g" if torch.cuda.get_device_properties(0).total_memory > 6e10 else "a100-40g"
    return next((name for name in ("h200", "h100", "4090") if name.upper() in title), title)


def _vpgtrans(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "vpgtrans.engine.cli", *arguments]


def _world(out: Path, deadline: float) -> dict[str, Any]:
    """The demo's parts. A training that was cut off goes on from its checkpoint; what has ended is noted under `out`, and not made again."""
    log, seconds = out / "world.log", {}
    commands = {"world": SCENES, **{name: [*kind, f"recipes/demo/{name}.yaml"] for name, kind in WORLD.items()}}
    if not torch.cuda.is_available():
        commands["source"] += SOURCE_REHEARSAL
    for name, command in commands.items():
        ended = out / "world" / name
        if ended.is_file() and (ROOT / "artifacts" / "demo" / name).is_dir():
            continue
        began = time.monotonic()
        if (code := _call(_vpgtrans(*command), log, deadline)) != 0:
            return {"ok": False, "failed": command, "code": code, "seconds_of": seconds, "end_of_log": _tail(log)}
        seconds[name] = round(time.monotonic() - began, 1)
        ended.parent.mkdir(parents=True, exist_ok=True)
        ended.touch()
    return {"ok": True, "seconds_of": seconds}


def _training(out: Path, deadline: float) -> dict[str, Any]:
    """The demo's VPGTrans arm on the GPU in each precision; arms that have ended are read, not run again."""
    if missing := [name for name in WORLD if not (out / "world" / name).is_file()]:
        return {"ok": False, "failed": f"needs the part `world`, which has not made {', '.join(missing)}"}
    log, arms = out / "training.log", {}
    on_gpu = torch.cuda.is_available()
    for name, overrides in ARMS.items():
        if not on_gpu and any(o.startswith("kernels.") for o in overrides):
            arms[name] = {"code": 0, "not_run": "its kernels need a GPU"}
            continue
        folder = (out / "training" / name.replace(" ", "_")).resolve()
        code, began = 0, time.monotonic()
        if not (folder / "summary.json").is_file():
            chosen = [*(TRAINING if on_gpu else REHEARSAL), *overrides, f"output.folder={folder}"]
            code = _call(_vpgtrans("train", "recipes/demo.yaml", *chosen), log, deadline)
        found = _curve(folder) if code == 0 else {"end_of_log": _tail(log)}
        arms[name] = {"code": code, "seconds": round(time.monotonic() - began, 1), **found}
    return {"ok": all(arm["code"] == 0 for arm in arms.values()), "arms": arms}


def _curve(folder: Path) -> dict[str, Any]:
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    speeds = [e["pairs_per_s"] for e in events if "pairs_per_s" in e]
    return {
        "validation_loss": [[e["pairs"], round(e["val_loss"], 4)] for e in events if e["event"] == "eval"],
        "pairs_per_s_median": sorted(speeds)[len(speeds) // 2] if speeds else None,
        "cider": summary.get("cider"),
    }


def _print_table(out: Path) -> None:
    print(f"\n{'part':22} {'ok':6} {'seconds':>8}  result")
    for part in PARTS:
        path = out / f"{part}.json"
        if not path.is_file():
            print(f"{part:22} {'-':6}")
            continue
        found = json.loads(path.read_text())
        told = {
            k: found[k]
            for k in ("device", "copy_gb_s", "matmul_tflops_bf16", "matmul_tflops_fp8_rowwise")
            if k in found
        }
        if part == "step":
            shapes = (found.get("bench") or {}).get("results", []) if found["ok"] else []
            told = {
                f"hours, {k}": round(v, 1) for r in shapes for k, v in r.get("hours_of_the_scaled_up_run", {}).items()
            }
        if part == "world":
            told = found.get("seconds_of") or {"failed": found.get("failed")}
        if part == "training":
            told = {
                n: arm["validation_loss"][-1][1]
                for n, arm in found.get("arms", {}).items()
                if arm.get("validation_loss")
            }
        print(
            f"{part:22} {'yes' if found['ok'] else 'NO':6} {found['seconds']:8.1f}  {told or (out / f'bench_{part}.json').name}"
        )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
