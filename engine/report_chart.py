"""Line charts as inline SVG text: no library, no script needed to read them.

A curve is a list of points (pairs, seconds or None, value). Colours, dashes and markers of the arms are CSS classes
`a0` … `a5`, so that one drawing serves the light and the dark scheme.
"""

from __future__ import annotations

import html
import json
import math
import statistics
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

Point = tuple[float, float | None, float]  # pairs, seconds, value

STYLES = 6  # how many arm styles the style sheet has; further arms start again
WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 46  # room for labels around the plot, in viewBox units


@dataclass(frozen=True)
class Line:
    """One polyline. `points` are (x, y) in data units; `ticks` are (x, text) marks on the line."""

    label: str
    style: int
    points: list[tuple[float, float]]
    bold: bool = True
    ticks: list[tuple[float, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Axis:
    """`label` under or beside the axis; `show` writes a value in full, for the tooltip."""

    label: str
    show: Callable[[float], str]
    scale: float = 1.0  # data units per axis unit, 60 for seconds drawn as minutes


def escape(value: object) -> str:
    """`value` as HTML text or attribute value."""
    return html.escape(str(value), quote=True)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float, step: float) -> str:
    """A tick label with no more digits than `step` needs: 20k, 1.5M, 0.25."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if step >= size / 10 and abs(value) >= size:
            return f"{value / size:g}{unit}"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(step * 10**digits - round(step * 10**digits)) > 1e-6:
        digits += 1
    return f"{value:.{digits}f}"


def interpolate(points: list[tuple[float, float]], x: float) -> float | None:
    """y at `x` on the polyline through `points` (x ascending); None outside of it."""
    if not points or not points[0][0] <= x <= points[-1][0]:
        return None
    i = bisect_right(points, x, key=lambda point: point[0])
    if i == len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def median_curve(curves: list[list[Point]]) -> list[Point]:
    """The median over seeds: point by point where they were evaluated at the same pairs, else interpolated."""
    if len(curves) == 1:
        return curves[0]
    tables = [{point[0]: point for point in curve} for curve in curves]
    common = sorted(set.intersection(*(set(table) for table in tables)))
    if 2 * len(common) >= min(len(table) for table in tables):
        return [_median_point(pairs, [table[pairs] for table in tables]) for pairs in common]
    everywhere = sorted(set().union(*tables))
    values = [[(p, table[p][2]) for p in sorted(table)] for table in tables]
    clocks = [[(p, table[p][1]) for p in sorted(table) if table[p][1] is not None] for table in tables]
    merged = []
    for pairs in everywhere:
        ys = [interpolate(line, pairs) for line in values]
        if None not in ys:
            xs = [interpolate(clock, pairs) for clock in clocks]
            merged.append(_median_point(pairs, [(pairs, x, y) for x, y in zip(xs, ys, strict=True)]))
    return merged


def _median_point(pairs: float, points: list[Point]) -> Point:
    seconds = [point[1] for point in points]
    middle = None if None in seconds else statistics.median(seconds)
    return pairs, middle, statistics.median(point[2] for point in points)


def smooth(points: list[Point], most: int = 120) -> list[Point]:
    """Running mean over a fiftieth of the curve, thinned to about `most` points."""
    half = len(points) // 100
    every = max(1, math.ceil(len(points) / most))
    out = []
    for i in [*range(0, len(points) - 1, every), len(points) - 1] if points else []:
        reach = min(half, i, len(points) - 1 - i)
        window = points[i - reach : i + reach + 1]
        out.append((points[i][0], points[i][1], statistics.fmean(point[2] for point in window)))
    return out


def value_range(values: list[float], cut_top: bool) -> tuple[float, float, bool]:
    """(low, high, cut): the y-range with a margin. `cut_top` drops the first, high part of a loss curve."""
    low, high = min(values), max(values)
    cut = False
    if cut_top and len(values) >= 5:
        limit = low + 2.5 * (sorted(values)[int(0.8 * (len(values) - 1))] - low)
        # cutting a little hides points and wins nothing
        if limit > low and high - low > 1.3 * (limit - low):
            high, cut = limit, True
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high if cut else high + margin, cut


def line_chart(
    name: str,
    lines: list[Line],
    x_axis: Axis,
    y_axis: Axis,
    level: float | None = None,
    cut_top: bool = False,
) -> str:
    """One chart as an `<svg>` element.

    Args:
        name: unique in the page, an ASCII identifier.
        lines: at least one with at least one point; all points finite.
        level: y of a dashed horizontal line.
        cut_top: let the y-axis end below outliers at the top; the chart says so when it happens.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    low, high, cut = value_range(ys + ([] if level is None else [level]), cut_top)
    x_low, x_high = min(0.0, min(xs)), max(xs)
    x_high = x_high if x_high > x_low else x_low + 1.0

    def sx(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def sy(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    summary = f"{y_axis.label} over {x_axis.label}, {len(lines)} lines"
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}">',
        f'<clipPath id="{name}-clip"><rect x="{LEFT}" y="{TOP - 4}" width="{WIDTH - LEFT - RIGHT + 6}" '
        f'height="{HEIGHT - TOP - BOTTOM + 8}"/></clipPath>',
        *_grid(x_low, x_high, low, high, x_axis, y_axis, sx, sy),
    ]
    if level is not None:
        parts.append(f'<path class="level" d="M{LEFT} {sy(level)}H{WIDTH - RIGHT}"/>')
    parts.append(f'<g clip-path="url(#{name}-clip)">')
    for line in sorted(lines, key=lambda line: line.bold):
        parts += _draw_line(line, x_axis, y_axis, sx, sy)
    parts.append("</g>")
    if cut:
        parts.append(f'<text class="halo end" x="{WIDTH - RIGHT}" y="{TOP + 10}">higher values are cut off</text>')
    parts.append('<circle class="cursor" r="6" cx="-20" cy="-20"/></svg>')
    return "".join(parts)


def _grid(
    x_low: float,
    x_high: float,
    low: float,
    high: float,
    x_axis: Axis,
    y_axis: Axis,
    sx: Callable[[float], float],
    sy: Callable[[float], float],
) -> list[str]:
    parts = []
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) or 1.0
    for y in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {sy(y)}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 7}" y="{sy(y) + 4.5:.1f}">{tick_text(y, step)}</text>')
    ticks = nice_ticks(x_low / x_axis.scale, x_high / x_axis.scale)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) or 1.0
    bottom = HEIGHT - BOTTOM
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
    for x in ticks:
        at = sx(x * x_axis.scale)
        parts.append(f'<path class="axis" d="M{at} {bottom}v5"/>')
        parts.append(f'<text class="mid" x="{at}" y="{bottom + 19}">{tick_text(x, step)}</text>')
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + bottom) / 2
    parts.append(f'<text class="mid" x="{middle_x}" y="{HEIGHT - 7}">{escape(x_axis.label)}</text>')
    turned = f'transform="translate(13 {middle_y}) rotate(-90)"'
    parts.append(f'<text class="mid" {turned}>{escape(y_axis.label)}</text>')
    return parts


def _draw_line(
    line: Line, x_axis: Axis, y_axis: Axis, sx: Callable[[float], float], sy: Callable[[float], float]
) -> list[str]:
    style = f"a{line.style % STYLES}"
    drawn = [(sx(x), sy(y), x_axis.show(x), y_axis.show(y)) for x, y in line.points]
    path = "M" + "L".join(f"{x} {y}" for x, y, _, _ in drawn)
    tips = json.dumps([[x, y, f"{at}: {value}"] for x, y, at, value in drawn], ensure_ascii=False)
    weight = "bold" if line.bold else "thin"
    parts = [
        f'<path class="line {weight} {style}" d="{path}" data-label="{escape(line.label)}" data-tips="{escape(tips)}"/>'
    ]
    if line.bold and len(drawn) <= 30:
        parts += [marker(line.style, x, y) for x, y, _, _ in drawn]
    pixels = [(x, y) for x, y, _, _ in drawn]
    for x, text in line.ticks:
        y = interpolate(line.points, x)
        if y is not None:
            mark = f'<path class="tick {style}" d="{_across(pixels, sx(x), sy(y))}"'
            parts.append(f'{mark} data-label="{escape(line.label)}" data-mark="{escape(text)}"/>')
    return parts


def _across(pixels: list[tuple[float, float]], x: float, y: float) -> str:
    """A stroke of 18 units across the polyline at (x, y); an upright one would vanish on a steep line."""
    before = [p for p in pixels if p[0] < x][-1:] or [(x, y)]
    after = [p for p in pixels if p[0] > x][:1] or [(x, y)]
    along_x, along_y = after[0][0] - before[0][0], after[0][1] - before[0][1]
    length = math.hypot(along_x, along_y) or 1.0
    half_x, half_y = -9 * along_y / length, 9 * along_x / length
    return f"M{x - half_x:.1f} {y - half_y:.1f}L{x + half_x:.1f} {y + half_y:.1f}"


def marker(style: int, x: float, y: float) -> str:
    """The small mark of an arm at (x, y): circle, square, diamond or triangle, so that colour is not needed."""
    shape = ("m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0", "m-3-3h6v6h-6z", "m0-4l4 4l-4 4l-4-4z", "m0-4l4 7h-8z")[style % 4]
    return f'<path class="mark a{style % STYLES}" d="M{x} {y}{shape}"/>'
