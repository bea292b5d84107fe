"""The `vpgtrans` command.  Each sub-command imports what it needs only once its arguments are known to be right."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import sys
from collections.abc import Sequence

from .planning.options import HELP as PLAN_HELP

EXIT_USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; exit code 0, 2 for a mistake in what was given (one message), 1 for a run that had to stop."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    arguments.sort(
        key=("--dry-run", "--rebuild", "--check").__contains__
    )  # last: argparse takes a recipe and its overrides in one run only
    parser = _parser()
    if arguments[:1] == ["report"]:
        from .report import main as report

        return report(arguments[1:])
    options = None if arguments[:1] == ["plan"] else _parsed(parser, arguments)
    if options is not None and options.command is None:
        parser.print_help()
        return EXIT_USAGE
    from .recipe import told

    try:
        return _plan(arguments[1:]) if options is None else options.run(options)
    except ValueError as error:  # RecipeError, DataError, ModelError, CheckpointError: what was given cannot be used
        print(told(error), file=sys.stderr)
        return EXIT_USAGE


def _parsed(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """What is not known is told with the usage of its sub-command and the option that comes nearest."""
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        command = _sub_commands(parser).get(options.command, parser)
        near = difflib.get_close_matches(unknown[0], command._option_string_actions, 1, cutoff=0.7)
        command.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {near[0]}?" if near else ""))
    return options


def _sub_commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vpgtrans", description="Give a language model eyes: transfer a visual prompt generator."
    )
    parser.add_argument("--version", action="version", version=f"vpgtrans {importlib.metadata.version('vpgtrans')}")
    commands = parser.add_subparsers(dest="command")
    train = _recipe_command(commands, "train", "train a vision-language model from a recipe", _train)
    train.epilog = "also: torchrun engine/train.py RECIPE"
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print modules, trainable parameters, updates, pairs and memory; needs neither weights nor data",
    )
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
    scenes.add_argument("out", help="new folder for images and COCO-style files")
    for name, count in (("train", 2000), ("source", 2000), ("val", 200), ("text", 8000)):
        what = "scenes described in words only" if name == "text" else f"scenes of the split {name!r}"
        scenes.add_argument(f"--{name}", type=int, default=count, metavar="N", help=f"{what}; default: %(default)s")
    scenes.add_argument("--pixels", type=int, default=72, metavar="N", help="side of an image; default: %(default)s")
    scenes.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    scenes.set_defaults(run=_scenes)
    _pack_command(commands)
    _cache_command(commands)
    demo = commands.add_parser("demo", help="the whole transfer and its baselines on the miniature world")
    demo.add_argument("--out", default="runs/demo", help="folder for runs and report; default: %(default)s")
    demo.add_argument("--seeds", type=int, default=1, metavar="N", help="of every arm; default: %(default)s")
    demo.add_argument(
        "--plan",
        default="recipes/demo/plan.yaml",
        help="which parts and arms; recipes/flickr8k/plan.yaml for photographs",
    )
    demo.add_argument("--jobs", type=int, default=None, help="jobs side by side; default: one a core, at most 4")
    demo.set_defaults(run=_demo)
    _score_command(commands)
    commands.add_parser("plan", help=PLAN_HELP)
    commands.add_parser(
        "report", help="one HTML page of a run or several: vpgtrans report RUN... --out report.html --reference tfs"
    )
    _model_commands(commands)
    _chat_command(commands)
    doctor = commands.add_parser("doctor", help="what was compiled, which kernels and packages are live, and why not")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)
    keys = commands.add_parser("keys", help="every key of a recipe: its values, default and meaning")
    keys.add_argument("beginning", nargs="?", default="", help="of the keys, such as data or stages.N.optimizer")
    keys.add_argument(
        "--kind",
        choices=("transfer", "lm", "vision", "vpg"),
        default="transfer",
        help="of recipe (default: %(default)s)",
    )
    keys.set_defaults(run=_keys)
    return parser


def _cache_command(commands) -> None:
    cache = _recipe_command(commands, "cache", "build the vision and prompt caches of a recipe before it runs", _cache)
    cache.epilog = "a stopped build goes on; on several GPUs: torchrun --no-python vpgtrans cache RECIPE"
    what = cache.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="show sizes and savings, build nothing")
    what.add_argument("--rebuild", action="store_true", help="delete what is there first, damaged or not")
    what.add_argument("--check", action="store_true", help="read everything that is there and verify its checksums")


def _pack_command(commands) -> None:
    pack = commands.add_parser(
        "pack", help="captioned images into .beton shards (FFCV's format) that recipes train from"
    )
    pack.add_argument("source", help="caption file; tar, folder of tars or pattern")
    pack.add_argument("out", help="folder for the shards, index.json and refused.json; the same command resumes")
    pack.add_argument("--images", metavar="FOLDER", help="folder that image names start at; none for tars")
    pack.add_argument(
        "--format", default="auto",
        choices=("auto", "coco", "karpathy", "visual_genome", "sbu", "laion_coco", "nocaps", "minigpt4"),
    )  # fmt: skip
    pack.add_argument("--split", choices=("train", "val", "test"), help="of Karpathy's own file")
    pack.add_argument("--questions", metavar="Q.json", help="VQA questions of the same images")
    pack.add_argument("--answers", metavar="A.json", help="their annotations")
    pack.add_argument("--name", help="of the set and its shards; default: the source's")
    pack.add_argument(
        "--shard-images", type=int, default=10_000, metavar="N", help="images a shard; default: %(default)s"
    )
    size = pack.add_mutually_exclusive_group()
    size.add_argument("--max-side", type=int, metavar="N", help="shrink to at most N pixels on the longer side")
    size.add_argument("--shorter-side", type=int, metavar="N", help="shrink to at most N pixels on the shorter side")
    pack.add_argument(
        "--raw", action="store_true", help="store pixels instead of JPEGs: quickest to read, 14 x the disk"
    )
    pack.add_argument("--page-mib", type=int, default=8, metavar="N", help="page of the format, the largest sample")
    pack.add_argument("--jobs", type=int, metavar="N", help="threads; default: one a core")
    pack.add_argument("--limit", type=int, metavar="N", help="only the first N images of the source")
    pack.add_argument(
        "--max-refused-share",
        type=float,
        default=0.5,
        help="more of the images refused is an error (default: %(default)s)",
    )
    pack.set_defaults(run=_pack)


def _model_commands(commands) -> None:
    """What is done with a finished model: caption, eval, export."""
    caption = commands.add_parser("caption", help="caption image files with a run, an export or a Hugging Face BLIP-2")
    caption.add_argument("model", help="run folder, export, or Hugging Face BLIP-2 folder or hub id")
    caption.add_argument("images", nargs="+", help="image files or folders of them")
    caption.add_argument("--prompt", default="", help="text after the image, such as 'Question: what is it? Answer:'")
    _generation_options(caption, 30, 1.0, "7, or the most where that is less")
    caption.set_defaults(run=_caption)
    evaluate = commands.add_parser("eval", help="predict a whole data set with a model and score it")
    evaluate.add_argument("model", help="run folder, export, or Hugging Face BLIP-2 folder or hub id")
    evaluate.add_argument("--task", required=True, choices=("caption", "nocaps", "vqa", "okvqa", "gqa"))
    evaluate.add_argument(
        "--references", required=True, help="captions, VQA annotations, or GQA questions with their answers"
    )
    evaluate.add_argument("--questions", help="official VQA questions that the annotations belong to")
    evaluate.add_argument("--images", required=True, help="folder that image names start at")
    evaluate.add_argument("--image-name", help="file name of an image id, such as COCO_val2014_{image_id:012d}.jpg")
    evaluate.add_argument("--split", choices=("train", "val", "test"), help="of Karpathy's own file")
    evaluate.add_argument("--limit", type=int, help="only the first N images or questions")
    evaluate.add_argument("--prompt", help="another prompt; {} stands for the question")
    evaluate.add_argument("--lemmatise", action="store_true", help="okvqa: lemmatise the answers, as the authors do")
    evaluate.add_argument("--out", required=True, help="folder for predictions.json and result.json")
    _generation_options(evaluate, None, None, "captions 7, answers 0")
    evaluate.set_defaults(run=_evaluate)
    export = commands.add_parser("export", help="write a run as a Hugging Face BLIP-2 folder that transformers loads")
    export.add_argument("model", metavar="run", help="a finished run")
    export.add_argument("out", help="new folder")
    export.add_argument(
        "--without-llm", action="store_true", help="name the language model instead of holding its weights"
    )
    export.add_argument("--max-shard-size", default="5GB", help="such as 5GB or 500MB; default: %(default)s")
    export.set_defaults(run=_export)


def _chat_command(commands) -> None:
    chat = commands.add_parser("chat", help="talk with a model about an image, in VL-Vicuna's conversation format")
    chat.add_argument("model", help="run folder, export, or Hugging Face BLIP-2 folder or hub id")
    chat.add_argument("--image", required=True, metavar="FILE")
    chat.add_argument("--prompt", action="append", metavar="TEXT", help="ask this and leave; again for further turns")
    chat.add_argument("--max-new-tokens", type=int, default=300, help="longest answer")
    chat.add_argument("--num-beams", type=int, default=1, help="above 1 an answer is shown when it is complete")
    chat.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest answer; above: sampling")
    chat.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    chat.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    chat.add_argument("--json", action="store_true", help="with --prompt: one JSON object at the end")
    chat.set_defaults(run=_chat)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_positive.__name__ = "positive integer"  # argparse names it in its message


def _generation_options(
    command: argparse.ArgumentParser, longest: int | None, penalty: float | None, shortest: str
) -> None:
    """The reference's settings by default; None where a task has its own."""
    own = "captions {}, answers {}"
    command.add_argument("--num-beams", type=_positive, default=5, help="default: %(default)s")
    command.add_argument(
        "--max-new-tokens", type=_positive, default=longest, help=f"default: {longest or own.format(30, 10)}"
    )
    command.add_argument("--min-new-tokens", type=int, help=f"default: {shortest}")
    command.add_argument(
        "--length-penalty", type=float, default=penalty, help=f"default: {penalty or own.format(1.0, -1.0)}"
    )
    command.add_argument(
        "--beam-score", choices=("generated", "prompt_and_generated"), default="generated",
        help="length that divides a beam's score; the reference's library version counted the text prompt too",
    )  # fmt: skip
    command.add_argument("--batch-images", type=_positive, default=16, help="images at a time; default: %(default)s")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU, fp32 on the CPU"
    )
    command.add_argument("--json", action="store_true")


def _recipe_command(commands, name: str, text: str, run, part: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text)
    if part:
        command.add_argument("part", choices=part)
    command.add_argument("recipe", help="a YAML file, such as those under recipes/")
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="in place of what the recipe says; items of lists by number: stages.0.pairs=640",
    )
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

    return train([options.recipe, *options.overrides, *(["--dry-run"] if options.dry_run else [])])


def _keys(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from .recipe import KINDS
    from .recipe.keys import keys_of

    table = Table(show_lines=False, box=None, pad_edge=False)
    for column in ("key", "values", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for key in keys_of(KINDS[options.kind], options.beginning):
        table.add_row(key.name, key.values, "(to be given)" if key.default is None else key.default, key.meaning)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=200)
    console.print(table)
    return 0


def _cache(options: argparse.Namespace) -> int:
    from .caching import main as cache

    return cache(options)


def _plan(arguments: list[str]) -> int:
    from .planning.command import main as plan

    return plan(arguments)


def _caption(options: argparse.Namespace) -> int:
    from .captioning import main as caption

    return caption(options)


def _chat(options: argparse.Namespace) -> int:
    from .chat import main as chat

    return chat(options)


def _evaluate(options: argparse.Namespace) -> int:
    from .evaluate import main as evaluate

    return evaluate(options)


def _export(options: argparse.Namespace) -> int:
    from .export.folder import export

    made = export(
        options.model, options.out, include_llm=not options.without_llm, max_shard_size=options.max_shard_size
    )
    print(f"<image> is token {made['image_token_id']}: {made['image_token']}")
    print(f"wrote {options.out} ({made['parameters']:,} parameters): {', '.join(made['files'])}")
    return 0


def _pretrain(options: argparse.Namespace) -> int:
    from .recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides, kinds=(options.part,))
    from .back_ends import check_back_ends

    check_back_ends(recipe)
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

    recipe = load_recipe(  # the data are not read
        options.recipe, options.overrides, kinds=("transfer",), check_files=False, keep_unset_variables=True
    )
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


def _pack(options: argparse.Namespace) -> int:
    from .data.pack import main as pack

    return pack(options)


def _demo(options: argparse.Namespace) -> int:
    from .demo import main as demo

    return demo(options)


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import main as doctor

    return doctor(options.json)


if __name__ == "__main__":
    sys.exit(main())
