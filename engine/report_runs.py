"""Reading the folders that training runs leave behind, and comparing them.

A run folder holds `log.jsonl` (required) and `summary.json`, `samples.json`, `recipe.yaml` (each optional).
Runs of one `arm` that differ in their seed are one group; every number of a group is the median over its seeds.

Speed-up as in arXiv 2305.01278, Table 3: where the reference (training from scratch) is at its best, divided by where
the transfer is first at least as good. The paper counts epochs; here it is caption pairs and seconds, stage 1 included.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

# -1: a smaller value is better, +1: a larger one is
DIRECTION = {"val_loss": -1, "cider": 1, "attributes_right": 1, "vqa_accuracy": 1}
SPEEDUP_KEYS = ("pairs_to_tfs_best", "seconds_to_tfs_best", "speedup_pairs", "speedup_seconds")
RESULT_KEYS = (
    "best_val_loss",
    "best_val_pairs",
    "final_val_loss",
    "cider",
    "attributes_right",
    "vqa_accuracy",
    "pairs",
    "seconds",
    "gpu_hours",
)


class ReportError(ValueError):
    """A run folder that cannot be reported, or a reference that is not among the runs."""


@dataclass(frozen=True)
class Run:
    """One run folder in memory. The events are those of `log.jsonl`, in order, without what a resume ran again."""

    folder: Path
    name: str
    arm: str
    seed: int | None
    device: str | None
    start: dict[str, Any]  # the first start event
    starts: int  # how often the run was started; more than one means that it was resumed
    ended: bool
    stages: list[dict[str, Any]]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    warnings: list[dict[str, Any]]
    summary: dict[str, Any]
    samples: list[dict[str, Any]]
    recipe: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)  # what was skipped or missing, in words

    def curve(self, metric: str) -> list[tuple[float, float | None, float]]:
        """Points (pairs, seconds or None, value) of the evaluations that have a finite `metric`."""
        return _points(self.evals, metric)

    def train_curve(self) -> list[tuple[float, float | None, float]]:
        """Points (pairs, seconds or None, loss) of the training log, finite ones only."""
        return _points(self.train, "loss")

    def result(self, key: str) -> float | None:
        """One of `RESULT_KEYS` for this run: from the log where the log decides it, else from `summary.json`."""
        losses = self.curve("val_loss")
        if losses and key in ("best_val_loss", "best_val_pairs"):
            best = best_point(losses, "val_loss")
            return best[2] if key == "best_val_loss" else best[0]
        written = number(self.summary.get(key))
        if written is not None or key.startswith("best"):
            return written
        if key == "final_val_loss":
            return losses[-1][2] if losses else None
        if key in DIRECTION:
            scores = self.curve(key)
            return scores[-1][2] if scores else None
        logged = [value for event in self.train + self.evals if (value := number(event.get(key))) is not None]
        return max(logged, default=None)


def number(value: Any) -> float | None:
    """`value` if it is a finite real number, else None (also for True, NaN and text)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) < 1e300 else None  # also false for NaN and for integers no float can hold


def _points(events: Iterable[dict[str, Any]], key: str) -> list[tuple[float, float | None, float]]:
    found = []
    for event in events:
        pairs, value = number(event.get("pairs")), number(event.get(key))
        if pairs is not None and value is not None:
            found.append((pairs, number(event.get("seconds")), value))
    return found


def load_run(path: str | Path) -> Run:
    """Read one run folder.

    A line of `log.jsonl` that is cut off (the run was killed) is skipped and named in `Run.notes`; optional files
    that are absent are named there too.

    Raises:
        ReportError: the folder or its `log.jsonl` is missing or empty, or one of the other files is malformed.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ReportError(f"run folder {folder}: expected a folder written by training, found none; check the path")
    notes: list[str] = []
    events = _read_log(folder, notes)
    summary = _read_json(folder, "summary.json", dict, notes, "the run has not ended; its numbers come from the log")
    samples = _read_json(folder, "samples.json", list, notes, "no images and captions to show")
    recipe = _read_recipe(folder, notes)
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        by_kind.setdefault(str(event.get("event")), []).append(event)
    start = by_kind.get("start", [{}])[0]
    header = {**start, **{key: value for key, value in (summary or {}).items() if value is not None}}
    seed = header.get("seed", (recipe or {}).get("seed"))
    evals = _without_replays(by_kind.get("eval", []))
    lost = sum("val_loss" in event and number(event["val_loss"]) is None for event in evals)
    if lost:
        notes.append(f"{lost} evaluation(s) with a validation loss that is not finite: left out of the curves")
    if not any(number(event.get("val_loss")) is not None for event in evals):
        notes.append("log.jsonl holds no evaluation with a validation loss: nothing to compare")
    return Run(
        folder=folder,
        name=str(header.get("name") or folder.name),
        arm=str(header.get("arm") or header.get("name") or folder.name),
        seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else None,
        device=None if header.get("device") is None else str(header["device"]),
        start=start,
        starts=len(by_kind.get("start", [])),
        ended="end" in by_kind,
        stages=list({str(event.get("index", i)): event for i, event in enumerate(by_kind.get("stage", []))}.values()),
        train=_without_replays(by_kind.get("train", [])),
        evals=evals,
        warnings=by_kind.get("warning", []),
        summary=summary or {},
        samples=[sample for sample in samples or [] if isinstance(sample, dict)],
        recipe=recipe,
        notes=notes,
    )


def _read_log(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    log = folder / "log.jsonl"
    if not log.is_file():
        raise ReportError(f"run folder {folder}: expected a log.jsonl in it, found none; is it the folder of a run?")
    events, broken = [], []
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = max((i for i, line in enumerate(lines, 1) if line.strip()), default=0)
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            broken.append(i)
            continue
        events.append(event) if isinstance(event, dict) else broken.append(i)
    if not events:
        raise ReportError(f"run folder {folder}: log.jsonl holds no event; train for at least one step first")
    if broken == [last]:
        notes.append(f"the last line of log.jsonl (line {last}) is cut off and was skipped: the run was killed")
    elif broken:
        named = ", ".join(map(str, broken[:5])) + (" …" if len(broken) > 5 else "")
        notes.append(f"{len(broken)} unreadable line(s) of log.jsonl were skipped: {named}")
    return events


def _read_json(folder: Path, name: str, expected: type, notes: list[str], consequence: str) -> Any:
    file = folder / name
    if not file.is_file():
        notes.append(f"no {name}: {consequence}")
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{file}: expected JSON, but {error}; write it again or remove it") from error
    if not isinstance(content, expected):
        kind = {dict: "an object", list: "a list"}[expected]
        raise ReportError(f"{file}: expected {kind}, found {type(content).__name__}; write it again or remove it")
    return content


def _read_recipe(folder: Path, notes: list[str]) -> dict[str, Any] | None:
    file = folder / "recipe.yaml"
    if not file.is_file():
        notes.append("no recipe.yaml: its settings cannot be compared")
        return None
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ReportError(f"{file}: expected YAML, but {error}; restore it or remove it") from error
    if not isinstance(recipe, dict):
        raise ReportError(
            f"{file}: expected a mapping of settings, found {type(recipe).__name__}; restore or remove it"
        )
    return recipe


def _without_replays(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop what a resumed run did a second time: of two events at the same place the later one counts."""
    kept: list[dict[str, Any]] = []
    for event in events:
        pairs = number(event.get("pairs"))
        if pairs is None:
            continue
        while kept and kept[-1]["pairs"] > pairs:
            kept.pop()
        if kept and _same_place(kept[-1], event):
            # loss and scores of one evaluation may be two events
            event = kept.pop() | event
        kept.append(event)
    return kept


def _same_place(a: dict[str, Any], b: dict[str, Any]) -> bool:
    # two stages meet at one number of pairs, and both evaluations there are meant
    return a["pairs"] == b["pairs"] and a.get("stage") == b.get("stage")


def best_point(points: list[tuple[float, float | None, float]], metric: str) -> tuple[float, float | None, float]:
    """The first of the best `points` (pairs, seconds, value) of a metric."""
    return max(points, key=lambda point: DIRECTION[metric] * point[2])


def speedup(reference: Run, run: Run, metric: str = "val_loss") -> dict[str, float | None]:
    """How much sooner `run` is as good as `reference` ever gets (arXiv 2305.01278, Table 3).

    Returns:
        `pairs_to_tfs_best`, `seconds_to_tfs_best`: where `run` is first at least as good as the reference's best;
        for the reference itself, where it is at its best. None: never.
        `speedup_pairs`, `speedup_seconds`: the reference's value over the run's. None: never, or reached before the
        first pair, where a ratio means nothing.

    Raises:
        ReportError: `metric` is not one of `DIRECTION`.
    """
    if metric not in DIRECTION:
        raise ReportError(f"metric: expected one of {', '.join(DIRECTION)}, got {metric!r}")
    result: dict[str, float | None] = dict.fromkeys(SPEEDUP_KEYS)
    reference_points = reference.curve(metric)
    if not reference_points:
        return result
    best_pairs, best_seconds, best = best_point(reference_points, metric)
    sign = DIRECTION[metric]
    for pairs, seconds, value in run.curve(metric):
        if sign * value >= sign * best:
            result["pairs_to_tfs_best"], result["seconds_to_tfs_best"] = pairs, seconds
            result["speedup_pairs"] = best_pairs / pairs if pairs else None
            result["speedup_seconds"] = best_seconds / seconds if seconds and best_seconds is not None else None
            break
    return result


def group_runs(runs: list[Run]) -> dict[str, list[Run]]:
    """Arm -> its runs in order of their seed. Runs that repeat arm and seed are told apart by name, then folder."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    groups: dict[str, list[Run]] = {}
    for arm, members in arms.items():
        if len({run.seed for run in members}) == len(members):
            groups[arm] = sorted(members, key=lambda run: (run.seed is None, run.seed))
            continue
        labels = [run.name for run in members]
        if len(set(labels)) < len(labels):
            labels = [str(run.folder) for run in members]
        for label, run in zip(labels, members, strict=True):
            taken = label in arms or label in groups
            groups[f"{arm}: {label}" if taken else label] = [run]
    return groups


def find_reference(groups: dict[str, list[Run]], reference: str | None) -> str:
    """The group that `reference` names (group, arm, run name or folder); for None `tfs` where present, else the first.

    Raises:
        ReportError: nothing or more than one group answers to the name.
    """
    if reference is None:
        return next((label for label in groups if label.lower() == "tfs"), next(iter(groups)))
    wanted = reference.lower()
    if exact := [label for label in groups if label.lower() == wanted]:
        return exact[0]
    found = []
    for label, members in groups.items():
        names = {name.lower() for run in members for name in (run.arm, run.name, run.folder.name, str(run.folder))}
        if wanted in names:
            found.append(label)
    if len(found) != 1:
        problem = "is not among the runs" if not found else f"fits {len(found)} of the runs"
        raise ReportError(f"reference: {reference!r} {problem}; expected one of {', '.join(found or groups)}")
    return found[0]


def summarise(runs: list[Run], reference: str | None = None) -> dict[str, dict[str, Any]]:
    """Results of every arm, as plain JSON values.

    Returns:
        arm -> `RESULT_KEYS` and `SPEEDUP_KEYS` (by validation loss; by CIDEr with the suffix `_cider`), each the
        median over the seeds, every seed against the reference of the same seed; `min` and `max`: the same keys over
        the seeds; `seeds`; `seeds_compared`; `seeds_reached`; `is_reference`; `notes`. A seed that never gets there
        counts as infinitely late in the median and is left out of `min` and `max`.

    Raises:
        ReportError: no runs, or no such reference.
    """
    if not runs:
        raise ReportError("runs: expected at least one run folder, got none")
    if repeated := [str(folder) for folder, n in Counter(run.folder.resolve() for run in runs).items() if n > 1]:
        raise ReportError(f"runs: expected each folder once, got several times {', '.join(repeated)}; remove one")
    groups = group_runs(runs)
    label = find_reference(groups, reference)
    return {arm: _summarise_arm(members, groups[label], arm == label) for arm, members in groups.items()}


def _summarise_arm(members: list[Run], references: list[Run], is_reference: bool) -> dict[str, Any]:
    notes: list[str] = []
    partners = [(run, _partner(run, references, notes)) for run in members]
    compared = [(run, partner) for run, partner in partners if partner is not None]
    columns: dict[str, list[float | None]] = {key: [run.result(key) for run in members] for key in RESULT_KEYS}
    for metric, suffix in (("val_loss", ""), ("cider", "_cider")):
        rows = [speedup(partner, run, metric) for run, partner in compared if partner.curve(metric)]
        for key in SPEEDUP_KEYS:
            columns[key + suffix] = [row[key] for row in rows]
    medians, lowest, highest = {}, {}, {}
    for key, values in columns.items():
        present = [value for value in values if value is not None]
        never_counts = key.startswith(SPEEDUP_KEYS)
        medians[key] = _median_or_never(values, key) if never_counts else _median(present)
        lowest[key], highest[key] = min(present, default=None), max(present, default=None)
    return {
        **medians,
        "min": lowest,
        "max": highest,
        "seeds": [run.seed for run in members],
        "seeds_compared": len(columns["pairs_to_tfs_best"]),
        "seeds_reached": sum(value is not None for value in columns["pairs_to_tfs_best"]),
        "is_reference": is_reference,
        "notes": notes,
    }


def _partner(run: Run, references: list[Run], notes: list[str]) -> Run | None:
    """The reference run of the same seed; the only one there is where seeds differ; else None."""
    same = next((candidate for candidate in references if candidate.seed == run.seed), None)
    if same is not None:
        return same
    if len(references) == 1:
        notes.append(f"seed {run.seed} is compared with the only reference run, which has seed {references[0].seed}")
        return references[0]
    notes.append(f"seed {run.seed} has no reference run of the same seed: left out of the speed-up")
    return None


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _median_or_never(values: list[float | None], key: str) -> float | None:
    never = -math.inf if key.startswith("speedup") else math.inf
    middle = _median([never if value is None else value for value in values])
    return middle if middle is not None and math.isfinite(middle) else None
