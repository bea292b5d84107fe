"""The report as one HTML page: no outside resources, light and dark, readable on a phone and without script."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from .report_chart import STYLES, Axis, Line, Point, escape, interpolate, line_chart, marker, median_curve, smooth
from .report_runs import Run, best_point, number
from .report_style import SCRIPT, STYLE
from .report_text import (
    COLUMNS,
    SCORES,
    arm_name,
    count_text,
    headline,
    seconds_text,
    share_text,
    shown_columns,
    value_text,
)

MAX_IMAGES = 12
THUMBNAIL_PIXELS = 160
LEVEL_SWATCH = '<svg class="swatch" viewBox="0 0 30 14" aria-hidden="true"><path class="level" d="M0 7H30"/></svg>'
MAX_TABLE_ROWS = 1500  # of the evaluations written out as numbers; about 100 bytes each


def build_page(title: str, groups: dict[str, list[Run]], summary: dict[str, dict[str, Any]]) -> str:
    """The whole page as text.

    Args:
        groups: arm -> runs, as of `group_runs`.
        summary: as of `summarise`, for the same arms.
    """
    reference = next(arm for arm, entry in summary.items() if entry["is_reference"])
    sections = [
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(headline(summary))}</p></header>',
        _table_section(summary, reference),
        _charts_section(groups, reference),
        _samples_section(groups),
        _notes_section(groups, summary),
        _recipe_section(groups),
        _provenance_section(groups),
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + f'\n</main><div id="tip" role="status" hidden></div><script>{SCRIPT}</script></body></html>\n'
    )


def _swatch(style: int) -> str:
    line = f'<path class="line bold a{style % STYLES}" d="M0 7H30"/>'
    return f'<svg class="swatch" viewBox="0 0 30 14" aria-hidden="true">{line}{marker(style, 15, 7)}</svg>'


def _table(caption: str, heads: list[str], rows: list[list[str]], kind: str = "plain") -> str:
    """A table that scrolls sideways on its own; heads and cells are HTML, the caption is text."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = "".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for first, *cells in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table class="{kind}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _table_section(summary: dict[str, dict[str, Any]], reference: str) -> str:
    """One column an arm, one row a measure, so that a phone and thirteen measures get along."""
    name = arm_name(reference)
    several = any(len(entry["seeds"]) > 1 for entry in summary.values())
    heads = ["" if len(summary) > 1 else "run"]
    for style, (arm, entry) in enumerate(summary.items()):
        tag = ' <small class="tag">reference</small>' if entry["is_reference"] and len(summary) > 1 else ""
        heads.append(f"{_swatch(style)}{escape(arm_name(arm))}{tag}")
    rows = [["seeds", *(_seeds_cell(entry) for entry in summary.values())]] if several else []
    for key in shown_columns(summary):
        title = escape(COLUMNS[key][0].format(name))
        rows.append([title, *(_number_cell(entry, key) for entry in summary.values())])
    text = "Time is training time without evaluation."
    if len(summary) > 1:
        text = (
            f"Speed-up: where {name} is at its best, divided by where the arm is first at least as good, every stage "
            f"counted in. {text} A dash: not reached, or not measured."
        )
    if several:
        text += " Numbers are medians over the seeds, with the smallest and the largest below."
    table = _table("Results", heads, rows, "results")
    return f'<section><h2>Results</h2>{table}<p class="note">{escape(text)}</p></section>'


def _seeds_cell(entry: dict[str, Any]) -> str:
    count = str(len(entry["seeds"]))
    if entry["is_reference"]:
        return count
    return f"{count}<small>{entry['seeds_reached']} of {entry['seeds_compared']} get there</small>"


def _number_cell(entry: dict[str, Any], key: str) -> str:
    show = COLUMNS[key][1]
    if entry[key] is None:
        return "–"
    low, high = entry["min"][key], entry["max"][key]
    spread = f"<small>{escape(show(low))}–{escape(show(high))}</small>" if low != high else ""
    return escape(show(entry[key])) + spread


def _charts_section(groups: dict[str, list[Run]], reference: str) -> str:
    figures = []
    for metric, label in ({"val_loss": "validation loss"} | SCORES | {"loss": "training loss (smoothed)"}).items():
        level = None
        if metric != "loss" and len(groups) > 1:
            bests = [best_point(run.curve(metric), metric)[2] for run in groups[reference] if run.curve(metric)]
            if bests:
                best = statistics.median(bests)
                level = (best, f"best of {arm_name(reference)}: {_show(metric)(best)}")
        figures += _figure_pair(groups, metric, label, level)
    if not figures:
        return ""
    legend = "".join(f"<li>{_swatch(style)}{escape(arm_name(arm))}</li>" for style, arm in enumerate(groups))
    hint = "A short stroke across a line marks where the next stage begins."
    if any(len(runs) > 1 for runs in groups.values()):
        hint += " Bold lines are medians over the seeds, thin lines single seeds."
    return (
        f'<section><h2>Curves</h2><ul class="legend">{legend}</ul><p class="note">{hint}</p>'
        f'<div class="figures">{"".join(figures)}</div>{_evaluations_table(groups)}</section>'
    )


def _show(metric: str) -> Callable[[float], str]:
    return share_text if metric == "attributes_right" else value_text


def _figure_pair(
    groups: dict[str, list[Run]], metric: str, label: str, level: tuple[float, str] | None
) -> Iterator[str]:
    """The chart over pairs and the chart over seconds, as far as the runs have the numbers."""
    curves = {
        arm: [(run, smooth(run.train_curve()) if metric == "loss" else run.curve(metric)) for run in runs]
        for arm, runs in groups.items()
    }
    longest = max((p[1] for runs in curves.values() for _, c in runs for p in c if p[1] is not None), default=0.0)
    size, unit = next(((s, u) for s, u in ((3600, "hours"), (60, "minutes")) if longest >= 2 * s), (1, "seconds"))
    axes = (Axis("pairs seen", lambda x: f"{count_text(x)} pairs"), Axis(f"training {unit}", seconds_text, size))
    for column, x_axis in enumerate(axes):
        lines = []
        for style, (arm, runs) in enumerate(curves.items()):
            lines += _arm_lines(arm, runs, style, column)
        if not lines:
            continue
        name = f"{metric}-{column}"
        y_axis = Axis(label, _show(metric))
        svg = line_chart(
            name, lines, x_axis, y_axis, level[0] if level else None, cut_top=metric in ("val_loss", "loss")
        )
        heading = escape(f"{label[0].upper()}{label[1:]} over {x_axis.label}")
        # beside the plot, because inside it the label lies on one curve or another
        key = f"<small>{LEVEL_SWATCH}{escape(level[1])}</small>" if level else ""
        yield f"<figure><figcaption>{heading} {key}</figcaption>{svg}</figure>"


def _arm_lines(arm: str, runs: list[tuple[Run, list[Point]]], style: int, column: int) -> list[Line]:
    """Lines of an arm over pairs (`column` 0) or seconds (1): the median in bold, each seed thin."""
    curves = [(run, curve) for run, curve in runs if curve]
    if not curves:
        return []
    lines = []
    if len(curves) > 1:
        lines = [
            Line(f"{arm_name(arm)}, seed {run.seed}", style, points, bold=False)
            for run, curve in curves
            if (points := _xy(curve, column))
        ]
    middle = median_curve([curve for _, curve in curves])
    if points := _xy(middle, column):
        run = curves[0][0]
        ticks = [
            (x, f"stage {stage.get('stage', '?')} begins")
            for stage in run.stages[1:]
            if (x := _stage_start(stage, middle, column)) is not None
        ]
        label = f"{arm_name(arm)}, median" if len(curves) > 1 else arm_name(arm)
        lines.append(Line(label, style, points, ticks=ticks))
    return lines


def _xy(curve: list[Point], column: int) -> list[tuple[float, float]]:
    # an evaluation just before and one just after a stage boundary share their place: the later one is drawn
    return sorted({point[column]: point[2] for point in curve if point[column] is not None}.items())


def _stage_start(stage: dict[str, Any], curve: list[Point], column: int) -> float | None:
    """Where a stage begins on the axis; the clock is read off the curve, so that a median has its own."""
    pairs = number(stage.get("pairs"))
    if pairs is None or column == 0:
        return pairs
    clock = sorted({point[0]: point[1] for point in curve if point[1] is not None}.items())
    return interpolate(clock, pairs)


def _evaluations_table(groups: dict[str, list[Run]]) -> str:
    """The numbers behind the curves, for readers who cannot see them."""
    metrics = [
        key
        for key in ("val_loss", *SCORES)
        if any(number(event.get(key)) is not None for runs in groups.values() for run in runs for event in run.evals)
    ]
    rows = []
    for arm, runs in groups.items():
        for run in runs:
            for event in run.evals:
                seconds = number(event.get("seconds"))
                values = [(key, number(event.get(key))) for key in metrics]
                cells = [
                    arm_name(arm),
                    "–" if run.seed is None else run.seed,
                    event.get("stage", "–"),
                    count_text(event["pairs"]),
                    "–" if seconds is None else seconds_text(seconds),
                    *("–" if value is None else _show(key)(value) for key, value in values),
                ]
                rows.append([escape(cell) for cell in cells])
    if not rows:
        return ""
    left_out = f" (the first {MAX_TABLE_ROWS} of {len(rows)})" if len(rows) > MAX_TABLE_ROWS else ""
    heads = ["arm", "seed", "stage", "pairs", "time", *(SCORES.get(key, "validation loss") for key in metrics)]
    table = _table("Evaluations", heads, rows[:MAX_TABLE_ROWS])
    return f"<details><summary>All evaluations as numbers{left_out}</summary>{table}</details>"


def _samples_section(groups: dict[str, list[Run]]) -> str:
    """Validation images with what each arm (its first run that has samples) says about them."""
    tables: dict[str, dict[str, tuple[Run, dict[str, Any]]]] = {}
    for arm, runs in groups.items():
        run = next((run for run in runs if run.samples), None)
        if run is not None:
            tables[arm] = {str(sample.get("image_id", i)): (run, sample) for i, sample in enumerate(run.samples)}
    images = list(dict.fromkeys(image for table in tables.values() for image in table))
    # images that most arms describe come first; the order of the file decides among equals
    images.sort(key=lambda image: -sum(image in table for table in tables.values()))
    if not images:
        return ""
    styles = {arm: style for style, arm in enumerate(groups)}
    cards = []
    for image in images[:MAX_IMAGES]:
        entries = {arm: table[image] for arm, table in tables.items() if image in table}
        said = "".join(
            f"<dt>{_swatch(styles[arm])}{escape(arm_name(arm))}</dt><dd>{escape(_caption(sample))}</dd>"
            for arm, (_, sample) in entries.items()
        )
        references = next((s["references"] for _, s in entries.values() if isinstance(s.get("references"), list)), [])
        human = "".join(f"<li>{escape(text)}</li>" for text in references)
        human = f'<p class="human">People say</p><ul class="human">{human}</ul>' if human else ""
        picture = _picture(image, [(run.folder, sample.get("file")) for run, sample in entries.values()], references)
        cards.append(f'<article class="card">{picture}<div><dl>{said}</dl>{human}</div></article>')
    count = f"{len(cards)} of {len(images)} images" if len(images) > len(cards) else f"{len(cards)} images"
    text = f"{count}."
    if any(len(runs) > 1 for runs in groups.values()):
        text = f"{count}; where an arm has several seeds, the captions are of the first."
    return f'<section><h2>Captions</h2><p class="note">{text}</p><div class="cards">{"".join(cards)}</div></section>'


def _caption(sample: dict[str, Any]) -> str:
    caption = sample.get("caption")
    return str(caption) if caption not in (None, "") else "(empty)"


def _picture(image_id: str, files: list[tuple[Path, Any]], references: list[Any]) -> str:
    """The first of `files` (folder, name in it) that can be read, as an embedded thumbnail; else a box that says so."""
    problem = "no file named"
    for folder, name in files:
        if not isinstance(name, str):
            continue
        try:
            data, width, height = thumbnail(folder / name)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            problem = f"{name}: {'not found' if isinstance(error, FileNotFoundError) else 'not readable'}"
            continue
        alt = str(references[0]) if references else f"validation image {image_id}"
        size = f'width="{width}" height="{height}"'
        return f'<img src="data:image/jpeg;base64,{data}" {size} alt="{escape(alt)}" title="{escape(image_id)}">'
    return f'<div class="missing">image {escape(image_id)}<br>{escape(problem)}</div>'


def thumbnail(file: Path) -> tuple[str, int, int]:
    """(base64 of a JPEG of at most `THUMBNAIL_PIXELS` a side, width, height), upright as its EXIF data says.

    Raises:
        OSError, ValueError, SyntaxError, DecompressionBombError: as of Pillow, for a file that it cannot read.
    """
    with Image.open(file) as image:
        image.draft("RGB", (2 * THUMBNAIL_PIXELS, 2 * THUMBNAIL_PIXELS))
        upright = ImageOps.exif_transpose(image).convert("RGB")
    upright.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    upright.save(buffer, "JPEG", quality=82, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii"), upright.width, upright.height


def _notes_section(groups: dict[str, list[Run]], summary: dict[str, dict[str, Any]]) -> str:
    """Warnings that training wrote, and what is missing or was skipped in the folders."""
    rows = []
    for arm, runs in groups.items():
        for run in runs:
            for event in run.warnings:
                value = number(event.get("value"))
                shown = f"{value:.4g}" if value is not None else event.get("value", "–")
                cells = (arm_name(arm), "–" if run.seed is None else run.seed, event.get("step", "–"))
                rows.append(
                    [escape(cell) for cell in (*cells, event.get("name", "?"), shown, event.get("message", ""))]
                )
    table = _table("Warnings", ["arm", "seed", "step", "warning", "value", "what it says"], rows) if rows else ""
    notes = [f"{run.name}: {note}" for runs in groups.values() for run in runs for note in run.notes]
    notes += [f"{arm_name(arm)}: {note}" for arm, entry in summary.items() for note in entry["notes"]]
    items = "".join(f"<li>{escape(note)}</li>" for note in dict.fromkeys(notes))
    listed = f'<h3>About the files</h3><ul class="notes">{items}</ul>' if items else ""
    warned = table or '<p class="note">Training gave no warnings.</p>'
    return f"<section><h2>Warnings</h2>{warned}{listed}</section>"


def _recipe_section(groups: dict[str, list[Run]]) -> str:
    """Recipe keys that differ between the arms; a value that differs between the seeds of an arm is a list."""
    recipes = {
        arm: [flatten(run.recipe) for run in runs if run.recipe is not None]
        for arm, runs in groups.items()
        if any(run.recipe is not None for run in runs)
    }
    if len(recipes) < 2:
        return ""
    rows = []
    for key in dict.fromkeys(key for flats in recipes.values() for flat in flats for key in flat):
        values = [", ".join(dict.fromkeys(flat.get(key, "–") for flat in flats)) for flats in recipes.values()]
        if len(set(values)) > 1:
            rows.append([f"<code>{escape(key)}</code>", *(escape(value) for value in values)])
    if not rows:
        return '<section><h2>Recipes</h2><p class="note">The recipes of the arms do not differ.</p></section>'
    table = _table("Recipe differences", ["key", *(escape(arm_name(arm)) for arm in recipes)], rows)
    return f'<section><h2>Recipes</h2><p class="note">Only the keys that differ.</p>{table}</section>'


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys -> text.

    List items that carry a `name` go by it, so that a stage is compared with the stage of the same name:
    {"stages": [{"name": "tune", "rate": 1}]} is {"stages.tune.name": "tune", "stages.tune.rate": "1"}.
    """
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        names = [item.get("name") if isinstance(item, dict) else None for item in value]
        distinct = None not in names and len(set(map(str, names))) == len(names)
        items = list(zip(names if distinct else range(len(value)), value, strict=True))
    if items:
        return {
            k: v for key, item in items for k, v in flatten(item, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    if isinstance(value, list):
        return {prefix: ", ".join(map(str, value)) or "none"}
    return {prefix: "not set" if value is None else str(value)}


def _provenance_section(groups: dict[str, list[Run]]) -> str:
    """Where each run comes from: one column a fact that any run has, one row a run."""
    facts: list[tuple[str, dict[str, str]]] = []
    for arm, runs in groups.items():
        facts += [(arm_name(arm), _facts(run)) for run in runs]
    keys = list(dict.fromkeys(key for _, fact in facts for key in fact))
    rows = [[escape(arm), *(escape(fact.get(key, "–")) for key in keys)] for arm, fact in facts]
    return f"<section><h2>Provenance</h2>{_table('Provenance', ['arm', *map(escape, keys)], rows, 'facts')}</section>"


def _facts(run: Run) -> dict[str, str]:
    facts = {"run": run.name, "seed": "–" if run.seed is None else str(run.seed), "device": run.device or "–"}
    facts["started"] = _date(run.start.get("time"))
    facts["state"] = ("finished" if run.ended else "not finished") + (
        f", resumed {run.starts - 1}×" if run.starts > 1 else ""
    )
    for stage in run.stages:
        trained = number(stage.get("trainable_parameters"))
        if trained is not None:
            facts[f"trained in {stage.get('stage', '?')}"] = count_text(trained)
    # only what is written down: versions and context mean whatever the trainer says
    for source in ("versions", "context"):
        found = run.start.get(source) or run.summary.get(source)
        if found:
            facts |= {key: _plain(text) for key, text in flatten(found, source).items()}
    return facts


def _plain(text: str) -> str:
    try:
        return f"{float(text):.4g}" if "." in text and text.count(".") == 1 else text
    except ValueError:
        return text


def _date(time: Any) -> str:
    """Seconds since 1970 or a text, as `2025-03-01 12:00 UTC` or the text itself."""
    stamp = number(time)
    if stamp is None:
        return "–" if time is None else str(time)
    try:
        return datetime.fromtimestamp(stamp, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, OSError, ValueError):
        return str(time)
