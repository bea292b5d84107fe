"""The `vpgtrans` command.  Each sub-command imports what it needs only once its arguments are known to be right."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

EXIT_USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; exit code 0, 2 for a mistake in what was given (one message), 1 for a run that had to stop."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if arguments[:1] == ["report"]:
        from .report import main as report

        return report(arguments[1:])
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return EXIT_USAGE
    from .recipe import RecipeError

    try:
        return options.run(options)
    except RecipeError as error:
        print(f"recipe error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except ValueError as error:  # DataError, ModelError, CheckpointError: what was given cannot be used
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vpgtrans", description="Give a language model eyes: transfer a visual prompt generator."
    )
    commands = parser.add_subparsers(dest="command")
    train = _recipe_command(commands, "train", "train a vision-language model from a recipe", _train)
    train.epilog = "also: torchrun engine/train.py RECIPE"
    convert = _recipe_command(
        commands,
        "convert",
        "fit the word converter of a recipe, print its quality, merge it into a projector",
        _convert,
    )
    convert.add_argument("--out", help="folder for the merged projector (projector.safetensors) and converter.json")
    pretrain = _recipe_command(
        commands, "pretrain", "train a part of a miniature world from a recipe", _pretrain, part=("lm", "vision", "vpg")
    )
    pretrain.epilog = "lm: a language model that uses context; vision: a small ViT; vpg: BLIP-2's first step"
    scenes = commands.add_parser("scenes", help="render the miniature world: JPEG scenes, captions, questions")
    scenes.add_argument("out")
    for name, count in (("train", 2000), ("source", 2000), ("val", 200), ("text", 8000)):
        scenes.add_argument(f"--{name}", type=int, default=count)
    scenes.add_argument("--pixels", type=int, default=72)
    scenes.add_argument("--seed", type=int, default=0)
    scenes.set_defaults(run=_scenes)
    demo = commands.add_parser("demo", help="the whole transfer and its baselines on the miniature world")
    demo.add_argument("--out", default="runs/demo")
    demo.add_argument("--seeds", type=int, default=1)
    demo.add_argument(
        "--plan",
        default="recipes/demo/plan.yaml",
        help="which parts and arms; recipes/flickr8k/plan.yaml for photographs",
    )
    demo.add_argument("--jobs", type=int, default=None, help="jobs side by side; default: one a core, at most 4")
    demo.set_defaults(run=_demo)
    _score_command(commands)
    commands.add_parser(
        "report", help="one HTML page of a run or several: vpgtrans report RUN... --out report.html --reference tfs"
    )
    doctor = commands.add_parser("doctor", help="what was compiled, which kernels and packages are live, and why not")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)
    return parser


def _recipe_command(commands, name: str, text: str, run, part: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text)
    if part:
        command.add_argument("part", choices=part)
    command.add_argument("recipe")
    command.add_argument("overrides", nargs="*", metavar="section.key=value")
    command.set_defaults(run=run)
    return command


def _score_command(commands) -> None:
    score = commands.add_parser(
        "score", help="score an existing prediction file in its official format, without a model"
    )
    score.add_argument("--task", required=True, choices=("caption", "vqa", "okvqa", "gqa", "nocaps"))
    score.add_argument("--references", required=True, metavar="R.json", help="captions, annotations or GQA questions")
    score.add_argument("--predictions", required=True, metavar="P.json", help="the task's official results format")
    score.add_argument("--questions", metavar="Q.json", help="vqa, okvqa: score the questions of this file only")
    score.add_argument(
        "--metrics", help="captions: some of cider,bleu,rouge,spice,meteor; default cider,bleu,rouge (others need Java)"
    )
    score.add_argument("--tokenized", action="store_true", help="captions: both files hold tokens joined by spaces")
    score.add_argument(
        "--lemmatise", action="store_true", help="okvqa: lemmatise predictions as the authors do (spaCy)"
    )
    score.add_argument("--json", action="store_true", help="print JSON in full precision instead of a table")
    score.add_argument("--out", metavar="FILE", help="write the JSON there too")
    score.set_defaults(run=_score)


def _train(options: argparse.Namespace) -> int:
    from .train import main as train

    return train([options.recipe, *options.overrides])


def _pretrain(options: argparse.Namespace) -> int:
    from .recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides, kinds=(options.part,))
    if options.part == "lm":
        from .pretrain.lm import main as pretrain
    elif options.part == "vision":
        from .pretrain.vision import main as pretrain
    else:
        from .pretrain.vpg import main as pretrain
    pretrain(recipe)
    return 0


def _convert(options: argparse.Namespace) -> int:
    from .recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides, kinds=("transfer",))
    from .transfer.command import convert

    convert(recipe, options.out)
    return 0


def _score(options: argparse.Namespace) -> int:
    from .scoring.command import main as score

    return score(options)


def _scenes(options: argparse.Namespace) -> int:
    from pathlib import Path

    from .data.scenes import write_world

    counts = write_world(
        Path(options.out),
        train=options.train,
        source=options.source,
        val=options.val,
        text=options.text,
        pixels=options.pixels,
        seed=options.seed,
    )
    print(f"wrote {options.out}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .demo import main as demo

    return demo(options)


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import main as doctor

    return doctor(options.json)


if __name__ == "__main__":
    sys.exit(main())
