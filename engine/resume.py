"""Going on where a run stopped: what it had done, which checkpoint all ranks go on from, and whether the recipe is still the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from .checkpoint import CheckpointError, latest_checkpoint
from .recipe import TransferRecipe
from .runtime import Runtime

# Sections that change nothing of what is learnt but rounding: that of FP8, too, where sharded blocks keep one copy in place of two.
MAY_DIFFER = ("output", "threads", "inputs_from", "guards", "distribution")


@dataclass
class Progress:
    """What a checkpoint remembers besides tensors.  `pairs`, `step` and `seconds` run on over the stages."""

    stage: int = 0
    stage_pairs: int = 0
    pairs: int = 0
    step: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_pairs: int = 0
    stale_evals: int = 0
    skipped: int = 0
    bad_images: dict[str, str] = field(default_factory=dict)
    captioned_at: int = 0
    stage_done: bool = False
    evaluation_due: bool = False
    position: dict[str, Any] | None = None
    tally: list[float] = field(default_factory=lambda: [0.0] * 4)
    watch: dict[str, Any] = field(default_factory=dict)
    cost_seconds: dict[str, float] = field(default_factory=dict)


def common_checkpoint(root: Path, runtime: Runtime) -> tuple[Path | None, list[str]]:
    """`latest_checkpoint`; CheckpointError on all ranks, told by rank 0, where one of them finds none that is whole, or another one."""
    problem, found, passed_over = None, None, []
    try:
        found, passed_over = latest_checkpoint(root)
    except CheckpointError as error:
        problem = str(error)
    of_ranks = runtime.gather((problem, found.name if found else "none"))
    names = [name for _, name in of_ranks]
    wrong = next((problem for problem, _ in of_ranks if problem), None)
    if wrong is None and len(set(names)) > 1:
        wrong = f"{root}: expected one newest checkpoint, found {', '.join(f'{n} on rank {r}' for r, n in enumerate(names))}; see whether all ranks "
        wrong += "have the same output.folder, and start again"
    if wrong is not None:
        error = CheckpointError(wrong)
        error.quiet = not runtime.is_main
        raise error
    return found, passed_over


def check_same_recipe(recipe: TransferRecipe, folder: Path) -> None:
    """A folder with checkpoints goes on only with the recipe that made them, `MAY_DIFFER` aside; CheckpointError names what differs."""
    path = folder / "recipe.yaml"
    before = yaml.safe_load(path.read_text()) if path.is_file() else {}
    now = {k: v for k, v in recipe.model_dump(mode="json").items() if k not in MAY_DIFFER}
    changed = list(_differences(before, now, ""))
    if changed:
        told = "; ".join(changed[:8]) + (f"; and {len(changed) - 8} more" if len(changed) > 8 else "")
        raise CheckpointError(
            f"{folder}: holds checkpoints of another recipe: {told}. "
            "Give another output.folder, go on with the recipe.yaml that lies there, or delete the folder"
        )


def _differences(before: Any, now: Any, key: str) -> Iterator[str]:
    """`key: was A, now B` for all that `now` has otherwise; a setting that `before` does not know yet is no difference."""
    is_section = not key.endswith(".config")  # sizes of a model: a key more or less is another model
    if isinstance(before, dict) and isinstance(now, dict) and is_section:
        for name in now:
            yield from _differences(before.get(name, now[name]), now[name], f"{key}.{name}".lstrip("."))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _differences(old, new, f"{key}.{index}")
    elif before != now:
        yield f"{key}: was {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_progress(checkpoint: Path) -> Progress:
    """The progress that a checkpoint holds.  Raises CheckpointError where another version of this package has written it."""
    state = json.loads((checkpoint / "state.json").read_text())
    if unknown := sorted(set(state) - {f.name for f in fields(Progress)}):
        raise CheckpointError(
            f"{checkpoint}: state.json holds {', '.join(unknown)}, which this version of vpgtrans does not know; go on with the version that "
            "wrote it, or give another output.folder"
        )
    return Progress(**state)
