"""`vpgtrans plan RECIPE --gpu h200 --gpus 8`: the bill of a recipe before any of it is spent."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from ..runlog import duration
from .options import check_options, parser

MODEL_OF_TIME = (
    "Seconds come from a model: each operation of the engine's code takes the longer of its FLOPs and its bytes at the device's rates, or the "
    "{operation_us:,.0f} us that Python needs to issue it.  Evaluation, captioning, start-up and waiting for data are not counted.  Memory and "
    "hours are those of the recipe's `distribution` on so many GPUs, with the communication that computing does not hide."
)

LAYOUTS = {
    "replicated": "frozen parts whole on each",
    "node": "sharded over a node",
    "world": "sharded over all GPUs",
}


def main(argv: list[str]) -> int:
    """Plan and print; exit code 0, 2 for a mistake in what was given.  `ValueError`s are the command line's to print."""
    options = parser().parse_intermixed_args(argv)
    check_options(options.gpus, options.price_per_gpu_hour)  # before seconds of imports
    from ..recipe import load_recipe

    recipe = load_recipe(
        options.recipe, options.overrides, kinds=("transfer",), check_files=False, keep_unset_variables=True
    )
    from .plan import plan_recipe

    found = plan_recipe(
        recipe, options.gpu, options.gpus, options.price_per_gpu_hour, options.efficiency, not options.no_switches
    )
    if options.json:
        json.dump(found, sys.stdout, indent=1)
        print()
    else:
        show(found)
    return 0


def show(found: dict[str, Any]) -> None:
    """Print what `plan_recipe` returned."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=150)
    device = found["device"]
    console.print(
        f"{found['recipe']} on {device['count']} x {device['title']}, {device['memory_bytes'] / 1e9:,.0f} GB each, {found['compute_dtype']}",
        markup=False,
    )
    rates = f"{device['matmul_tflops']:,.3g} TFLOP/s in products, {device['copy_gb_s']:,.4g} GB/s in memory"
    console.print(f"Rates: {rates} ({device['rates']}).\n", markup=False)
    _table(
        console, "parts", ("part", "parameters", "would come from"),
        [(p["name"], f"{p['parameters']:,}", p["origin"]) for p in found["parts"]],
    )  # fmt: skip
    _memory(console, found)
    _flops(console, found)
    for stage in found["stages"]:
        rows = [
            (s["name"], "on" if s["on"] else "off", _giga(s["flops_a_pair_without"]), _more(s, stage), s["why"])
            for s in stage["savings"]
        ]
        _table(console, f"savings in {stage['name']}", ("saving", "", "GFLOP a pair without", "", "why"), rows)
    _bill(console, found)
    for stage in found["stages"]:
        _communication(console, stage)
    _disk(console, found)
    if found["switches"]:
        _table(
            console, "one switch flipped, best first", ("setting", "GPU-hours", "saves", "fits", "largest memory, GiB", ""),
            [_switch_row(s, found["gpu_hours"]) for s in found["switches"]],
        )  # fmt: skip
    console.print(MODEL_OF_TIME.format(operation_us=found["operation_us"]), markup=False)
    for line in found["notes"]:
        console.print(line, markup=False)


def _table(console: Console, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        is_text = column in ("part", "would come from", "saving", "why", "setting", "set", "")
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def short_hours(hours: float, sign: str = "") -> str:
    """Two decimals; where those would say nothing, minutes or seconds with their unit."""
    if abs(hours) >= 0.1 or hours == 0:
        return f"{hours:{sign}.2f}"
    return f"{60 * hours:{sign}.1f} min" if abs(hours) >= 1 / 60 else f"{3600 * hours:{sign}.1f} s"


def _giga(flops: float | None) -> str:
    return "-" if flops is None else f"{flops / 1e9:,.3g}" if flops < 1e11 else f"{flops / 1e9:,.0f}"


def _more(saving: dict[str, Any], stage: dict[str, Any]) -> str:
    without = saving["flops_a_pair_without"]
    return "" if without is None else f"x {without / stage['flops_a_pair']:.2f}"


def _memory(console: Console, found: dict[str, Any]) -> None:
    stages = found["stages"]
    rows = [(name, *(f"{s['memory_bytes'][name] / 2**30:.2f}" for s in stages)) for name in stages[0]["memory_bytes"]]
    rows.append(("rows_per_micro_batch of the recipe", *(f"{s['rows_per_micro_batch']}" for s in stages)))
    rows.append(("largest rows_per_micro_batch that fits", *(f"{s['largest_rows_per_micro_batch']}" for s in stages)))
    rows.append(("rows of an update a GPU", *(f"{s['rows_an_update_and_gpu']:.1f}" for s in stages)))
    _table(console, "memory of one GPU, GiB", ("part", *(s["name"] for s in stages)), rows)
    for stage in stages:
        if not stage["fits"]:
            console.print(f"{stage['name']} does not fit: {stage['remedy']}", markup=False)


def _flops(console: Console, found: dict[str, Any]) -> None:
    for stage in found["stages"]:
        rows = [
            (
                name, _giga(p["flops_a_pair"]), _giga(p["backward_flops_a_pair"]), f"{p['bytes_a_pair'] / 1e6:,.1f}",
                f"{1e3 * p['seconds_an_update']:,.1f}",
            )
            for name, p in stage["parts"].items()
        ]  # fmt: skip
        total = sum(p["bytes_a_pair"] for p in stage["parts"].values())
        rows.append(("together", _giga(stage["flops_a_pair"]), "", f"{total / 1e6:,.1f}", ""))
        shape = f"{stage['tokens_a_pair']:.1f} tokens and {stage['images_a_pair']:.2f} encodings a pair"
        columns = ("part", "GFLOP a pair", "of it backward", "MB moved a pair", "ms an update, one GPU")
        _table(console, f"{stage['name']}: {shape}", columns, rows)
    rows = [
        (
            d["name"], "unknown" if d["images"] is None else f"{d['images']:,}", f"{d['captions_an_image']:.2f}", f"{d['tokens_a_caption']:.1f}",
            f"{d['images_seen']:,}", d["origin"],
        )
        for d in found["data"]
    ]  # fmt: skip
    _table(console, "data", ("set", "images", "captions an image", "tokens a caption", "images seen", ""), rows)


def _bill(console: Console, found: dict[str, Any]) -> None:
    rows = []
    for s in found["stages"]:
        use = "-" if s["utilisation"] is None else f"{s['utilisation']:.0%}"
        said = [
            "" if s["fits"] else "does not fit, see above",
            f"{s['idle_share']:.0%} of the GPUs' time idle: {s['rows_an_update_and_gpu']:.1f} rows an update and GPU"
            if s["idle_share"] > 0.05
            else "",
            "issuing operations decides, not the GPU" if s["issuing_decides"] else "",
            f"{duration(s['cache_build_s'])} to build the vision cache" if s["cache_build_s"] else "",
            f"decoding asks for {s['decoding_cores']:.1f} cores" if s["decoding_cores"] >= 0.05 else "",
        ]
        money = "-" if s["money"] is None else f"{s['money']:,.2f}"
        rows.append(
            (
                s["name"], f"{s['pairs']:,}", f"{s['exaflops']:.3g}", f"{s['pairs_per_s']:,.0f}", f"{s['pairs_per_s_per_gpu']:,.0f}", use,
                short_hours(s["hours"]), short_hours(s["gpu_hours"]), money, "; ".join(w for w in said if w),
            )
        )  # fmt: skip
    money = "-" if found["money"] is None else f"{found['money']:,.2f}"
    rows.append(("together", "", "", "", "", "", "", short_hours(found["gpu_hours"]), money, ""))
    columns = ("part", "pairs", "EFLOP", "pairs/s", "a GPU", "of the peak", "hours", "GPU-hours", "money", "")
    _table(console, "the bill", columns, rows)


def _communication(console: Console, stage: dict[str, Any]) -> None:
    rows = [
        (
            f"{r['gpus']}", LAYOUTS[r["layout"]], f"{r['reduced_bytes'] / 1e6:,.0f}", f"{r['gathered_bytes'] / 1e9:,.2f}",
            f"{1e3 * r['reduce_s']:,.1f}", f"{1e3 * r['gather_s']:,.1f}", f"{1e3 * r['computing_s']:,.0f}", f"{r['hidden_share']:.0%}",
            f"{r['added_share']:+.1%}",
        )
        for r in stage["communication"]
    ]  # fmt: skip
    if rows:
        columns = (
            "GPUs",
            "part",
            "MB reduced",
            "GB gathered",
            "ms reducing",
            "ms gathering",
            "ms computing",
            "hidden",
            "adds",
        )
        title = f"communication of a GPU in an update of {stage['name']}, NVLink inside a node of 8, 400 Gb/s a GPU between nodes"
        _table(console, title, columns, rows)


def _disk(console: Console, found: dict[str, Any]) -> None:
    disk = found["disk"]
    cache, prompts = ("on" if disk[name] else "off; were it on" for name in ("vision_cache", "prompt_cache"))
    console.print(
        f"Disk for {disk['images']:,} training images: vision cache ({cache}) {disk['vision_cache_bytes'] / 1e9:,.1f} GB "
        f"({disk['views']} view(s) of {disk['vision_cache_bytes_an_image'] / 1e3:,.0f} kB), prompt cache ({prompts}) "
        f"{disk['prompt_cache_bytes'] / 1e9:,.1f} GB, packed JPEGs {disk['pack_bytes'] / 1e9:,.1f} GB, "
        f"token tables {disk['token_table_bytes'] / 1e9:,.2f} GB.\n",
        markup=False,
    )


def _switch_row(switch: dict[str, Any], now: float) -> tuple[str, ...]:
    settings = " ".join(switch["settings"])
    if switch["impossible"]:
        return settings, "-", "-", "no", "-", switch["impossible"]
    saved = switch["saves_gpu_hours"]
    disk = f"{switch['disk_bytes'] / 1e9:,.0f} GB on disk" if switch["disk_bytes"] else ""
    return (
        settings, short_hours(switch["gpu_hours"]), f"{short_hours(saved, '+')} ({saved / now:+.0%})", "yes" if switch["fits"] else "no",
        f"{switch['memory_bytes'] / 2**30:.1f}", "; ".join(t for t in (switch["note"], disk) if t),
    )  # fmt: skip
