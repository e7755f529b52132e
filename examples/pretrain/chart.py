"""Loss and flip rate of several runs as one SVG, with no plotting library."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

COLOURS = ("#333333", "#d1495b", "#00798c", "#edae49", "#6a4c93", "#66a182", "#8d5524", "#2e4057")
WIDTH, HEIGHT, LEFT, TOP, GAP = 420, 300, 60, 30, 90
Points = list[tuple[float, float]]


def draw(runs: dict[str, list[dict]], out: Path) -> None:
    """`runs`: the name of each and the lines that it logged."""
    panels = [("loss, nats per byte", "loss"), ("flip rate per step", "flip_rate")]
    parts = [
        _panel(i, title, {n: _points(lines, key) for n, lines in runs.items()}) for i, (title, key) in enumerate(panels)
    ]
    legend = [
        _label(LEFT + 130 * (i % 6), TOP + HEIGHT + 50 + 18 * (i // 6), name, COLOURS[i % 8])
        for i, name in enumerate(runs)
    ]
    size = f'width="{2 * (WIDTH + GAP)}" height="{TOP + HEIGHT + 70 + 18 * (len(runs) // 6)}"'
    body = "\n".join([*parts, *legend])
    out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def read(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def _points(lines: Sequence[dict], key: str) -> Points:
    return [(line["step"], line[key]) for line in lines if line.get(key, 0) > 0]


def _panel(index: int, title: str, curves: dict[str, Points]) -> str:
    """Steps to the right, the logarithm of the values upwards."""
    left = LEFT + index * (WIDTH + GAP)
    every = [p for points in curves.values() for p in points]
    if not every:
        return _label(left, TOP - 10, f"{title}: nothing was logged", "black")
    last = max(x for x, _ in every)
    low, high = (math.log(f(y for _, y in every)) for f in (min, max))
    span = max(high - low, 1e-9)

    def place(x: float, y: float) -> str:
        return f"{left + WIDTH * x / last:.1f},{TOP + HEIGHT * (1 - (math.log(y) - low) / span):.1f}"

    paths = [" ".join(place(*p) for p in points) for points in curves.values()]
    style = 'fill="none" stroke-width="1.5"'
    lines = [f'<polyline {style} stroke="{COLOURS[i % 8]}" points="{path}"/>' for i, path in enumerate(paths)]
    frame = f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>'
    marks = [_mark(left, low + span * k / 4, HEIGHT * (1 - k / 4)) for k in range(5)]
    end = f'<text x="{left + WIDTH}" y="{TOP + HEIGHT + 18}" text-anchor="end">step {last:.0f}</text>'
    return "\n".join([_label(left, TOP - 10, title, "black"), frame, *marks, end, *lines])


def _mark(left: float, value: float, y: float) -> str:
    return f'<text x="{left - 6}" y="{TOP + y + 4:.1f}" text-anchor="end">{math.exp(value):.3g}</text>'


def _label(x: float, y: float, text: str, colour: str) -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}">{escape(text)}</text>'
