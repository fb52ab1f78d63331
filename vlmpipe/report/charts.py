"""Charts as inline SVG strings: no script, no font, no network, so that the page opens from disk for ever.

Colours come from the page's CSS variables, so that charts follow its light and dark themes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from markupsafe import Markup

WIDTH = 460  # narrow, so that the text can still be read where a phone shrinks it
LETTER = 7  # pixels of one, about


def funnel(steps: Sequence[tuple[str, int, int]]) -> Markup:
    """Horizontal bars of (label, rows left, rows dropped here), the first one the whole pool."""
    top = max(1, steps[0][1] if steps else 1)
    numbers = [f"{left:,} −{dropped:,}" if dropped else f"{left:,}" for _, left, dropped in steps]
    label_width = LETTER * max(len(label) for label, _, _ in steps) + 12
    height, bar_width = 26, WIDTH - label_width - LETTER * max(map(len, numbers)) - 12
    rows = []
    for i, ((label, left, dropped), number) in enumerate(zip(steps, numbers)):
        y, kept, lost = i * height, bar_width * left / top, bar_width * dropped / top
        rows.append(
            f'<text x="{label_width - 8}" y="{y + 17}" text-anchor="end">{escape(label)}</text>'
            f'<rect class="keep" x="{label_width}" y="{y + 4}" width="{kept:.1f}" height="{height - 8}" rx="2"/>'
            f'<rect class="drop" x="{label_width + kept:.1f}" y="{y + 4}" width="{lost:.1f}" height="{height - 8}"/>'
            f'<text class="number" x="{label_width + kept + lost + 6:.1f}" y="{y + 17}">{number}</text>'
        )
    return _svg(WIDTH, height * len(steps) + 4, "".join(rows))


def histogram(
    values: np.ndarray, highlighted: np.ndarray, threshold: float | None, label: str, bins: int = 48
) -> Markup:
    """Counts of finite `values` [N], `highlighted` ones (bool [N]) in the keeping colour, and a line at `threshold`."""
    finite = np.isfinite(values)
    values, highlighted = values[finite], highlighted[finite]
    if not len(values):
        return Markup("<p>no values</p>")
    edges = np.histogram_bin_edges(values, bins)
    every, inside = np.histogram(values, edges)[0], np.histogram(values[highlighted], edges)[0]
    height, base, left = 170, 140, 10
    scale, step = (base - 10) / max(1, every.max()), (WIDTH - 2 * left) / bins
    bars = [
        f'<rect class="{name}" x="{left + i * step:.1f}" y="{base - (offset + count) * scale:.1f}" '
        f'width="{step - 1:.1f}" height="{count * scale:.1f}"/>'
        for i in range(bins)
        for name, count, offset in (("keep", inside[i], 0), ("drop", every[i] - inside[i], inside[i]))
        if count
    ]
    span = (edges[-1] - edges[0]) or 1.0
    if threshold is not None and edges[0] <= threshold <= edges[-1]:
        x = left + (threshold - edges[0]) / span * (WIDTH - 2 * left)
        bars.append(f'<line class="threshold" x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{base}"/>')
        aside = f'x="{x + 4:.1f}"' if x < WIDTH / 2 else f'x="{x - 4:.1f}" text-anchor="end"'
        bars.append(f'<text class="number" {aside} y="12">threshold {threshold:.3g}</text>')
    ticks = [
        f'<text class="number" x="{left + share * (WIDTH - 2 * left):.1f}" y="{base + 14}" text-anchor="{anchor}">'
        f"{edges[0] + share * span:.3g}</text>"
        for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end"))
    ]
    axis = f'<line class="axis" x1="{left}" x2="{WIDTH - left}" y1="{base}" y2="{base}"/>'
    name = f'<text x="{WIDTH / 2}" y="{height - 2}" text-anchor="middle">{escape(label)}</text>'
    return _svg(WIDTH, height, "".join(bars) + axis + "".join(ticks) + name)


def lines(series: dict[str, Sequence[tuple[float, float]]], label: str, smooth: int = 1) -> Markup:
    """Curves of finite (x, y) points by name on shared axes; `smooth` averages over as many points."""
    arrays = {name: np.asarray(points, float).reshape(-1, 2) for name, points in series.items()}
    series = {name: points[np.isfinite(points).all(axis=1)] for name, points in arrays.items()}
    series = {name: points for name, points in series.items() if len(points) > 1}
    if not series:
        return Markup("<p>no curve</p>")
    every = np.concatenate(list(series.values()))
    (x0, y0), (x1, y1) = every.min(0), every.max(0)
    height, base, left = 190, 158, 44
    x_scale, y_scale = (WIDTH - left - 10) / ((x1 - x0) or 1), (base - 10) / ((y1 - y0) or 1)
    shapes = []
    for i, (name, points) in enumerate(series.items()):
        points = _moving_average(points, smooth)
        path = " ".join(f"{left + (x - x0) * x_scale:.1f},{base - (y - y0) * y_scale:.1f}" for x, y in points)
        shapes.append(f'<polyline class="line line{i}" points="{path}"/>')
        place = f'x="{WIDTH - 12}" y="{16 + 14 * i}" text-anchor="end"'
        shapes += [f'<text class="line{i} number" {place}>{escape(name)}</text>'] if len(series) > 1 else []
    axes = (
        f'<line class="axis" x1="{left}" x2="{left}" y1="6" y2="{base}"/>'
        f'<line class="axis" x1="{left}" x2="{WIDTH - 10}" y1="{base}" y2="{base}"/>'
        f'<text class="number" x="{left - 4}" y="14" text-anchor="end">{y1:.3g}</text>'
        f'<text class="number" x="{left - 4}" y="{base}" text-anchor="end">{y0:.3g}</text>'
        f'<text class="number" x="{left}" y="{base + 14}">{x0:g}</text>'
        f'<text class="number" x="{WIDTH - 10}" y="{base + 14}" text-anchor="end">{x1:g}</text>'
    )
    name = f'<text x="{WIDTH / 2}" y="{height - 4}" text-anchor="middle">{escape(label)}</text>'
    return _svg(WIDTH, height, axes + "".join(shapes) + name)


def interval(value: float, low: float, high: float, limit: float | None = None, top: float = 1.0) -> Markup:
    """A point with its interval on a scale from 0 to `top`, with a tick at `limit`."""
    width, middle = 180, 9

    def x(number: float) -> float:
        return 4 + (width - 8) * min(max(number / top, 0), 1)

    tick = "" if limit is None else f'<line class="threshold" x1="{x(limit):.1f}" x2="{x(limit):.1f}" y1="1" y2="17"/>'
    return _svg(
        width, 18,
        f'<line class="axis" x1="4" x2="{width - 4}" y1="{middle}" y2="{middle}"/>{tick}'
        f'<line class="whisker" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{middle}" y2="{middle}"/>'
        f'<circle class="dot" cx="{x(value):.1f}" cy="{middle}" r="4"/>', "small",
    )


@dataclass(frozen=True)
class Difference:
    """A row of a forest plot. limit: what the interval must lie above; state: `good`, `bad` or `unsure`."""

    label: str
    estimate: float
    low: float
    high: float
    limit: float | None = None
    state: str = "unsure"


def forest(rows: Sequence[Difference], label: str) -> Markup:
    """Differences with their intervals on one scale, and in each row a line at zero and one at its limit.

    Names stand above the intervals, so that long ones leave these their width.
    """
    height, top, left, right = 36, 4, 10, WIDTH - 10
    every = [end for row in rows for end in (row.estimate, row.low, row.high, row.limit or 0.0)] + [0.0]
    low, high = min(every), max(every)
    span = (high - low) or 1.0
    base = top + height * len(rows)

    def x(number: float) -> float:
        return left + 6 + (right - left - 12) * (number - low) / span

    shapes = [_forest_row(row, top + i * height, x, left, right) for i, row in enumerate(rows)]
    ends = [number for number in (low, high) if abs(x(number) - x(0)) > 6 * LETTER]
    shapes += [
        f'<text class="number" x="{x(number):.1f}" y="{base + 14}" text-anchor="{anchor}">{number:+.3g}</text>'
        for number, anchor in ((end, "start" if end == low else "end") for end in ends)
    ]
    anchor = "start" if x(0) < 6 * LETTER else "end" if x(0) > right - 6 * LETTER else "middle"
    axis = f'<line class="axis" x1="{left}" x2="{right}" y1="{base}" y2="{base}"/>'
    zero = f'<text class="number" x="{x(0):.1f}" y="{base + 14}" text-anchor="{anchor}">0</text>'
    name = f'<text x="{WIDTH / 2}" y="{base + 30}" text-anchor="middle">{escape(label)}</text>'
    return _svg(WIDTH, base + 36, axis + "".join(shapes) + zero + name)


def _forest_row(row: Difference, y: float, x: Callable[[float], float], left: float, right: float) -> str:
    numbers = f"{row.estimate:+.3g} [{row.low:+.3g}, {row.high:+.3g}]"
    letters = int((right - left) / LETTER) - len(numbers) - 1
    label = row.label if len(row.label) <= letters else row.label[: letters - 1] + "…"
    middle = y + 25

    def upright(kind: str, number: float) -> str:
        return f'<line class="{kind}" x1="{x(number):.1f}" x2="{x(number):.1f}" y1="{y + 16}" y2="{y + 34}"/>'

    return (
        f'<text x="{left}" y="{y + 11}">{escape(label)}</text>'
        f'<text class="number" x="{right}" y="{y + 11}" text-anchor="end">{numbers}</text>'
        f'{upright("zero", 0)}{"" if row.limit is None else upright("threshold", row.limit)}'
        f'<line class="whisker {row.state}" x1="{x(row.low):.1f}" x2="{x(row.high):.1f}" y1="{middle}" y2="{middle}"/>'
        f'<circle class="dot {row.state}" cx="{x(row.estimate):.1f}" cy="{middle}" r="4"/>'
    )


def _moving_average(points: np.ndarray, window: int) -> np.ndarray:
    if window < 2 or len(points) < 2 * window:
        return points
    kernel = np.ones(window) / window
    return np.column_stack([np.convolve(points[:, i], kernel, "valid") for i in (0, 1)])


def _svg(width: float, height: float, body: str, kind: str = "chart") -> Markup:
    return Markup(f'<svg class="{kind}" viewBox="0 0 {width} {height}" width="{width}" role="img">{body}</svg>')
