"""Names, numbers and sentences of the report: shared by the page and the table on the screen."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

# arm names of the paper and of its ablations, letters only -> as the paper writes them
ARM_NAMES = {
    "tfs": "TFS",
    "vpgtrans": "VPGTrans",
    "vpginherit": "VPGInherit",
    "projectoronly": "Projector only",
    "vpgtransnoconverter": "VPGTrans without converter",
    "vpgtranswithoutconverter": "VPGTrans without converter",
}
SCORES = {"cider": "CIDEr", "attributes_right": "attributes right", "vqa_accuracy": "VQA accuracy"}


def arm_name(label: str) -> str:
    """An arm as readers know it: `vpg_trans` is VPGTrans; an unknown name stays as it is."""
    return ARM_NAMES.get(re.sub(r"[^a-z]", "", label.lower()), label)


def count_text(value: float) -> str:
    """A count in full: 19,200."""
    return f"{value:,.0f}"


def value_text(value: float) -> str:
    """A loss or a score with three decimals."""
    return f"{value:.3f}"


def seconds_text(seconds: float) -> str:
    """A duration in the largest unit that keeps it above two: 95.0 s, 12.3 min, 3.4 h."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def times_text(value: float) -> str:
    """A speed-up: 3.1×."""
    return f"{value:.1f}×" if value >= 0.95 else f"{value:.2f}×"


def share_text(value: float) -> str:
    """A share of one as per cent."""
    return f"{100 * value:.1f}%"


def hours_text(value: float) -> str:
    """Device-hours with three significant digits."""
    return f"{value:.3g}"


# key of a summary -> heading with the reference's name to fill in, and how to write a value
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "best_val_loss": ("best validation loss", value_text),
    "pairs_to_tfs_best": ("pairs to {}’s best", count_text),
    "seconds_to_tfs_best": ("time to {}’s best", seconds_text),
    "speedup_pairs": ("speed-up in pairs", times_text),
    "speedup_seconds": ("speed-up in time", times_text),
    "final_val_loss": ("final validation loss", value_text),
    "cider": ("CIDEr", value_text),
    "speedup_pairs_cider": ("speed-up in pairs, by CIDEr", times_text),
    "attributes_right": ("attributes right", share_text),
    "vqa_accuracy": ("VQA accuracy", value_text),
    "pairs": ("pairs in all", count_text),
    "seconds": ("training time", seconds_text),
    "gpu_hours": ("device-hours", hours_text),
}


def shown_columns(summary: dict[str, dict[str, Any]]) -> list[str]:
    """Keys of `COLUMNS` that say something about at least one arm; speed-ups only where there is an arm to compare."""
    alone = len(summary) == 1
    # zero hours were not measured
    keys = [
        key
        for key in COLUMNS
        if any(entry.get(key) is not None and (entry[key] or key != "gpu_hours") for entry in summary.values())
    ]
    return [key for key in keys if not (alone and key.startswith("speedup"))]


def headline(summary: dict[str, dict[str, Any]]) -> str:
    """The result in one sentence, computed from a summary of `summarise`."""
    label, reference = next((arm, entry) for arm, entry in summary.items() if entry["is_reference"])
    name, best = arm_name(label), reference["best_val_loss"]
    seeds = len(reference["seeds"])
    median = f", median of {seeds} seeds" if seeds > 1 else ""
    if best is None:
        return f"{name} has no validation loss yet, so there is nothing to compare with."
    if len(summary) == 1:
        where = reference["best_val_pairs"]
        return f"{name} is at its best validation loss ({best:.3f}{median}) after {count_text(where)} pairs."
    others = {arm: entry for arm, entry in summary.items() if not entry["is_reference"]}
    ranked = sorted(others, key=lambda arm: _lateness(others[arm]))
    first, *rest = ranked
    if others[first]["pairs_to_tfs_best"] is None:
        losses = {arm: entry["best_val_loss"] for arm, entry in others.items() if entry["best_val_loss"] is not None}
        closest = min(losses, key=losses.__getitem__, default=None)
        near = f"; the closest is {arm_name(closest)} with {losses[closest]:.3f}" if closest else ""
        return f"No other arm reaches the best validation loss of {name} ({best:.3f}{median}){near}."
    sentence = f"{arm_name(first)} reaches the best validation loss of {name} ({best:.3f}{median}) "
    sentence += _how_soon(others[first], name)
    return sentence + "".join(f"; {arm_name(arm)} {_how_soon(others[arm], name)}" for arm in rest) + "."


def _lateness(entry: dict[str, Any]) -> float:
    pairs = entry["pairs_to_tfs_best"]
    return float("inf") if pairs is None else pairs


def _how_soon(entry: dict[str, Any], reference: str) -> str:
    if entry["pairs_to_tfs_best"] is None:
        return "does not reach it" if entry["seeds_compared"] else f"has no run of {reference} to be compared with"
    if entry["speedup_pairs"] is None:
        return "before it is trained at all"
    return f"with {_ratio(entry['speedup_pairs'], 'fewer pairs', 'more pairs', 'as many pairs')}" + (
        f" and in {_ratio(entry['speedup_seconds'], 'less time', 'more time', 'as much time')}"
        if entry["speedup_seconds"] is not None
        else ""
    )


def _ratio(speedup: float, less: str, more: str, same: str) -> str:
    if 0.95 < speedup < 1.05:
        return f"about {same}"
    return f"{speedup:.1f}× {less}" if speedup > 1 else f"{1 / speedup:.1f}× {more}"
