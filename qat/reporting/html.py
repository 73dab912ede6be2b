"""The report of a run as one self-contained HTML page: no scripts, no fonts or images from elsewhere."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from qat.reporting.table import Results

Curve = Sequence[tuple[float, float]]  # (step, value)

STYLE = """
:root { --ink: #1d2733; --soft: #66758a; --line: #dfe5ec; --paper: #fff; --tint: #f5f7fa; --good: #15803d;
  --bad: #b42318; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ef; --soft: #94a3b5; --line: #2f3a47; --paper: #141a21; --tint: #1b232c; --good: #4ade80;
    --bad: #f97066; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.5rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 1.1rem; margin: 2.6rem 0 .8rem; }
p { margin: .4rem 0; }
.soft { color: var(--soft); }
.verdict { font-weight: 600; margin-top: .9rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--line);
  padding: .45rem .7rem; }
td { border-bottom: 1px solid var(--line); padding: .45rem .7rem; vertical-align: top; }
td + td, th + th { text-align: right; }
.wide td + td, .wide th + th { text-align: left; }
tr:last-child td { border-bottom: none; }
.results tr:last-child td { font-weight: 600; background: var(--tint); }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1.2rem; }
figure { margin: 0; padding: .9rem 1rem; background: var(--tint); border-radius: .5rem; }
figcaption { font-size: .9rem; font-weight: 600; margin-bottom: .3rem; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
pre { background: var(--tint); border-radius: .5rem; padding: 1rem; overflow-x: auto; font-size: .85rem;
  line-height: 1.45; }
summary { cursor: pointer; font-weight: 600; font-size: 1.1rem; margin: 2.6rem 0 .8rem; }
"""
COLORS = ("#2563eb", "#d97706", "#059669", "#c026d3", "#dc2626")


def report(
    title: str,
    results: Results,
    coverage: Mapping[str, Any],
    certificate: Mapping[str, Any],
    curves: Mapping[str, Mapping[str, Curve]],
    config: str,
) -> str:
    """The page as a string.

    Args:
        title: heading, such as the name of the run folder.
        results: the table.
        coverage, certificate: their ``to_dict()``.
        curves: one figure per name, each with its curves: ``{"val accuracy": {"float": [(step, value), ...]}}``.
        config: the resolved configuration as YAML text.
    """
    headers, rows = results.cells()
    verdict = {True: "good", False: "bad", None: "soft"}[results.bit_equal]
    figures = "".join(
        f"<figure><figcaption>{html.escape(name)}</figcaption>{line_chart(lines)}</figure>"
        for name, lines in curves.items()
        if any(lines.values())
    )
    return page(
        title,
        f"<p class='soft'>{results.examples} test examples. "
        f"{results.timing().capitalize()}"
        + ("" if results.higher_is_better else f" {html.escape(results.title().capitalize())}: lower is better.")
        + "</p>"
        f"<h2>Results</h2>{table_of(headers, rows, 'results')}"
        f"<p class='verdict {verdict}'>{html.escape(results.parity())}</p>"
        + (f"<h2>Training</h2><div class='curves'>{figures}</div>" if figures else "")
        + f"<h2>Coverage</h2>{_value(coverage)}"
        f"<h2>Certificate</h2>{_value(certificate)}"
        f"<details><summary>Configuration</summary><pre>{html.escape(config)}</pre></details>",
    )


def page(title: str, body: str) -> str:
    """A self-contained HTML page; ``body`` is markup."""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>{body}</body></html>\n"
    )


def line_chart(lines: Mapping[str, Curve], width: int = 460, height: int = 220) -> str:
    """Curves as inline SVG with axes at round numbers and a legend; NaN and infinite values are left out.

    >>> line_chart({"float": [(0, 1.0), (10, 0.5)]}).startswith("<svg viewBox='0 0 460 220'")
    True
    """
    kept = {name: [(x, y) for x, y in curve if math.isfinite(y)] for name, curve in lines.items()}
    points = [point for curve in kept.values() for point in curve]
    if not points:
        return "<p class='soft'>no values</p>"
    axes = _Axes(points, width, height)
    parts = [axes.svg]
    at = float(axes.LEFT)
    for (name, curve), color in zip(kept.items(), COLORS * (1 + len(kept) // len(COLORS))):
        path = " ".join(f"{axes.across(x):.1f},{axes.down(y):.1f}" for x, y in curve)
        parts.append(
            f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='1.8' stroke-linejoin='round'/>"
            f"<circle cx='{at + 4:.0f}' cy='9' r='4' fill='{color}'/>"
            f"<text x='{at + 12:.0f}' y='13'>{html.escape(name)}</text>"
        )
        at += 26 + 7 * len(name)
    return "".join(parts) + "</svg>"


def scatter_chart(groups: Mapping[str, Curve], width: int = 760, height: int = 380) -> str:
    """Points as inline SVG, one color and one line of legend for each group; those of ``"float ..."`` are hollow.

    >>> scatter_chart({"w8a8": [(24692, 0.99)]}).count("<circle")
    2
    """
    kept = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in groups.items()}
    points = [point for group in kept.values() for point in group]
    if not points:
        return "<p class='soft'>no values</p>"
    line = 15
    axes = _Axes(points, width, height)
    parts = [axes.svg.replace(f"0 0 {width} {height}", f"0 0 {width} {height + 8 + line * len(kept)}", 1)]
    for number, ((name, group), color) in enumerate(zip(kept.items(), COLORS * (1 + len(kept) // len(COLORS)))):
        fill = "none" if name.startswith("float ") else color
        dot = f"r='4' fill='{fill}' stroke='{color}' stroke-width='1.5'"
        parts += [f"<circle cx='{axes.across(x):.1f}' cy='{axes.down(y):.1f}' {dot}><title>{html.escape(name)}: "
                  f"{y:.6g}, {x:,.0f} bytes</title></circle>" for x, y in group]
        below = height + 8 + line * number
        parts.append(f"<circle cx='{axes.LEFT + 4}' cy='{below}' {dot}/>"
                     f"<text x='{axes.LEFT + 14}' y='{below + 4}'>{html.escape(name)}</text>")
    return "".join(parts) + "</svg>"


class _Axes:
    """Where values lie in a figure: round numbers at the ends of both axes, and the opening of its SVG."""

    LEFT, RIGHT, TOP, BOTTOM = 46, 8, 24, 22

    def __init__(self, points: Curve, width: int, height: int) -> None:
        self.width, self.height = width, height
        x_ticks, y_ticks = (_ticks(min(values), max(values)) for values in zip(*points))
        self.x_ends, self.y_ends = (x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1])
        parts = [f"<svg viewBox='0 0 {width} {height}' role='img'>"]
        for y in y_ticks:
            parts.append(
                f"<line x1='{self.LEFT}' x2='{width - self.RIGHT}' y1='{self.down(y):.1f}' y2='{self.down(y):.1f}' "
                f"stroke='var(--line)'/>"
                f"<text x='{self.LEFT - 6}' y='{self.down(y) + 4:.1f}' text-anchor='end'>{y:.6g}</text>"
            )
        for x in x_ticks:
            anchor = "end" if x == x_ticks[-1] else "middle"
            parts.append(
                f"<text x='{self.across(x):.1f}' y='{height - 6}' text-anchor='{anchor}'>"
                f"{f'{x:,.0f}' if abs(x) >= 1e6 else f'{x:.6g}'}</text>"
            )
        self.svg = "".join(parts)

    def across(self, x: float) -> float:
        first, last = self.x_ends
        return self.LEFT + (x - first) / (last - first) * (self.width - self.LEFT - self.RIGHT)

    def down(self, y: float) -> float:
        first, last = self.y_ends
        return self.height - self.BOTTOM - (y - first) / (last - first) * (self.height - self.TOP - self.BOTTOM)


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """At least two round numbers, evenly spaced, that enclose low..high."""
    if high - low < 1e-12 * max(abs(high), 1):
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def table_of(headers: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    """A table of text, escaped; ``kind`` is its class."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headers)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return (
        f"<div class='scroll'><table class='{kind}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)


def _value(value: Any) -> str:
    """Plain data as HTML: dicts by name or in a list are a table; another dict is its scalars, then its parts."""
    if isinstance(value, Mapping) and value and all(isinstance(item, Mapping) for item in value.values()):
        return _value([{"name": name, **item} for name, item in value.items()])
    if isinstance(value, Mapping):
        nested = {k: v for k, v in value.items() if isinstance(v, Mapping | list | tuple) and v}
        scalars = [[str(k).replace("_", " "), _text(v)] for k, v in value.items() if k not in nested]
        out = table_of(["", ""], scalars, "wide") if scalars else ""
        return out + "".join(f"<h2>{html.escape(str(k).replace('_', ' '))}</h2>{_value(v)}" for k, v in nested.items())
    if isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
        columns = list(dict.fromkeys(key for item in value for key in item))
        return table_of(
            [str(c).replace("_", " ") for c in columns], [[_text(i.get(c)) for c in columns] for i in value], "wide"
        )
    return f"<pre>{html.escape(_text(value))}</pre>"
