"""Train a vision-language model from a recipe: the whole two-stage transfer, or any of the paper's baselines.

    torchrun engine/train.py recipes/demo.yaml [section.key=value ...]
    torchrun -m vpgtrans.engine.train recipes/demo.yaml
    vpgtrans train recipes/demo.yaml
    vpgtrans train recipes/vl_llama.yaml --dry-run      what would be trained, and what memory it takes, on the meta device

Top to bottom: recipe (checked before anything else is imported) -> process -> data -> model -> for each stage: freeze, order, optimiser,
resume, loop -> best model, scores, samples.  Run it again after a kill and it goes on from its last checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (
    None,
    "",
):  # `torchrun engine/train.py` puts engine/ itself on the path; its modules belong to the package
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
    from vpgtrans.engine.train import main

    if __name__ == "__main__":
        sys.exit(main())

from .recipe import RecipeError, TransferRecipe, load_recipe, told

INTERRUPTED = 130  # as shells have it: 128 + SIGINT
USAGE = "usage: train.py RECIPE.yaml [section.key=value ...] [--dry-run]"


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 for a recipe or data error (one message), 1 for a run that had to stop, 75 for one that a scheduler asked to, 130 after
    Ctrl-C."""
    given = sys.argv[1:] if argv is None else argv
    dry = "--dry-run" in given
    arguments = [a for a in given if a != "--dry-run"]
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    if not arguments:
        print(USAGE, file=sys.stderr)
        return 2
    if unknown := [a for a in arguments if a.startswith("-")]:
        print(f"{USAGE}\ntrain.py: error: unrecognized arguments: {' '.join(unknown)}", file=sys.stderr)
        return 2
    try:
        recipe = load_recipe(
            arguments[0], arguments[1:], kinds=("transfer",), check_files=not dry, keep_unset_variables=dry
        )
    except RecipeError as error:
        print(told(error), file=sys.stderr)
        return 2
    try:
        return _run(recipe, dry)
    except KeyboardInterrupt:
        print(_interrupted(recipe, dry), file=sys.stderr)
        return INTERRUPTED


def _run(recipe: TransferRecipe, dry: bool) -> int:
    from .checkpoint import CheckpointError
    from .data.coco import DataError
    from .data.images import ImageRefused
    from .guards import RunStopped
    from .loop import run
    from .models.llm import ModelError
    from .notice import EXIT_CODE, StoppedOnNotice
    from .out_of_memory import explain, shortage
    from .startup import RankMissing, StartError

    try:
        if dry:
            from .dry_run import dry_run

            dry_run(recipe)
        else:
            run(recipe)
    except (RecipeError, CheckpointError, DataError, ImageRefused, ModelError) as error:
        if not getattr(error, "quiet", False):  # another rank says the same
            print(told(error), file=sys.stderr)
        return 2
    except StartError as error:
        if not error.quiet:
            print(error, file=sys.stderr)
        return 1 if isinstance(error, RankMissing) else 2  # torchrun may start the ranks again after a 1
    except RunStopped as error:
        if not error.quiet:
            print(f"stopped: {error}", file=sys.stderr)
        return 1
    except StoppedOnNotice as error:
        if not error.quiet:
            print(f"stopped {error}", file=sys.stderr)
        return EXIT_CODE
    except (RuntimeError, MemoryError) as error:
        found = shortage(error)
        if found is None:
            raise
    else:
        return 0
    # Out here the error is gone, and with it the frames that held the run's tensors.
    print(f"stopped: {explain(recipe, found)}", file=sys.stderr)
    return 1


def _interrupted(recipe: TransferRecipe, dry: bool) -> str:
    """The one line after Ctrl-C."""
    if dry:
        return "interrupted"
    from .checkpoint import latest_checkpoint

    found = latest_checkpoint(recipe.output.folder / "checkpoints")[0]
    where = f"the same command goes on from {found}" if found else "there is no checkpoint yet"
    return f"interrupted; {where} (SIGTERM or SIGUSR1, in place of Ctrl-C, saves before it ends)"


if __name__ == "__main__":
    sys.exit(main())
