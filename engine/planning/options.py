"""The arguments of `vpgtrans plan`; imports nothing heavy, so that a mistake shows at once."""

from __future__ import annotations

import argparse

GPUS = ("h200", "h100", "a100-40g", "a100-80g", "4090", "cpu")
HELP = "what a recipe would take on named GPUs: memory, hours, money, and which switch saves most"


def parser() -> argparse.ArgumentParser:
    """Options and `section.key=value` may come in any order."""
    made = argparse.ArgumentParser(prog="vpgtrans plan", description=HELP)
    made.add_argument("recipe", help="a YAML file, such as those under recipes/")
    made.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="in place of what the recipe says; items of lists by number: stages.0.pairs=640",
    )
    made.add_argument(
        "--gpu", required=True, choices=GPUS, help="datasheet or measured rates; cpu: this machine, measured now"
    )
    made.add_argument(
        "--gpus",
        type=int,
        default=1,
        metavar="N",
        help="data parallel, laid out as the recipe's `distribution` has it; default: 1",
    )
    made.add_argument("--price-per-gpu-hour", type=float, metavar="X", help="in any currency")
    made.add_argument("--efficiency", type=float, metavar="SHARE", help="of the peaks; default: measured, or 0.7")
    made.add_argument("--no-switches", action="store_true", help="leave out the table of switches, which takes longest")
    made.add_argument("--json", action="store_true")
    return made


def check_options(gpus: int, price: float | None) -> None:
    """Raise ValueError where there are no GPUs, or money would be earned."""
    if gpus < 1:
        raise ValueError(f"--gpus: expected at least 1, got {gpus}")
    if price is not None and not 0 <= price < float("inf"):
        raise ValueError(f"--price-per-gpu-hour: expected 0 or more, got {price:g}")
