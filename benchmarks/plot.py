"""Owns how figures are drawn as SVG: over time as lines in panels, or of their bounds as bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 760, 150
"""Of the field of one panel."""
_LEFT, _TOP, _BELOW = 70, 30, 30
_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")


@dataclass(frozen=True)
class Panel:
    """Lines that share an axis, which begins at 0 or, where it is `log`, at a power of ten."""

    title: str
    lines: Mapping[str, Sequence[float]]
    log: bool = False


def bars(title: str, shares: Mapping[str, float]) -> str:
    """Return bars below each other as an SVG document: what is spent of each budget, 1 is all."""
    row, names, most = 18, 430, max(2.0, *shares.values())
    width, height = names + _WIDTH // 2 + 60, _TOP + row * len(shares) + _BELOW
    unit = _WIDTH / 2 / most
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">',
        '<g font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(10, 18, title, size=14),
    ]
    for number, (name, share) in enumerate(shares.items()):
        top, length = _TOP + number * row, share * unit
        color = _COLORS[2] if share <= 1 else _COLORS[1]
        parts += [
            _text(names - 8, top + 12, name, anchor="end"),
            f'<rect x="{names}" y="{top + 2}" width="{length:.1f}" height="13" fill="{color}"/>',
            _text(names + length + 5, top + 12, f"{share:.2f}"),
        ]
    parts.append(
        f'<line x1="{names + unit:.1f}" x2="{names + unit:.1f}" y1="{_TOP}"'
        f' y2="{_TOP + row * len(shares)}" stroke="#333333" stroke-dasharray="4 3"/>'
    )
    return "\n".join([*parts, "</g></svg>"]) + "\n"


def svg(title: str, times: Sequence[float], panels: Sequence[Panel]) -> str:
    """Return the panels as an SVG document; `times` are seconds, shown as minutes."""
    height = _TOP + len(panels) * (_HEIGHT + _TOP + _BELOW)
    width = _LEFT + _WIDTH + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">',
        '<g font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(_LEFT, 18, title, size=14),
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, times, _TOP + number * (_HEIGHT + _TOP + _BELOW) + _TOP)
    return "\n".join([*parts, "</g></svg>"]) + "\n"


def _panel(panel: Panel, times: Sequence[float], top: float) -> list[str]:
    values = [value for line in panel.lines.values() for value in line if value > 0] or [1.0]
    low, high = _bounds(min(values), max(values), log=panel.log)
    end = max(times)

    def x(seconds: float) -> float:
        return _LEFT + seconds / end * _WIDTH

    def y(value: float) -> float:
        if panel.log:
            share = math.log(max(value, low) / low) / math.log(high / low)
        else:
            share = value / high
        return top + _HEIGHT * (1 - share)

    parts = [_text(_LEFT, top - 6, panel.title, size=12)]
    for value in _ticks(low, high, log=panel.log):
        parts.append(
            f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y(value):.1f}" y2="{y(value):.1f}"'
            ' stroke="#dddddd"/>'
        )
        parts.append(_text(_LEFT - 6, y(value) + 4, f"{value:,g}", anchor="end"))
    step = max(1, math.ceil(end / 60 / 10))
    parts += [
        _text(x(minute * 60), top + _HEIGHT + 15, f"{minute} min", anchor="middle")
        for minute in range(0, math.floor(end / 60) + 1, step)
    ]
    for number, (name, line) in enumerate(panel.lines.items()):
        color = _COLORS[number % len(_COLORS)]
        points = " ".join(f"{x(at):.1f},{y(v):.1f}" for at, v in zip(times, line, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}"/>')
        parts.append(_text(_LEFT + _WIDTH - 90 * number, top - 6, name, anchor="end", fill=color))
    return parts


def _bounds(least: float, most: float, *, log: bool) -> tuple[float, float]:
    if log:
        low = 10 ** math.floor(math.log10(least))
        return low, max(10 ** math.ceil(math.log10(most)), low * 10)
    unit = 10 ** math.floor(math.log10(most))
    return 0, math.ceil(most * 1.05 / unit * 2) / 2 * unit


def _ticks(low: float, high: float, *, log: bool) -> list[float]:
    if log:
        return [low * 10**n for n in range(round(math.log10(high / low)) + 1)]
    return [high * n / 4 for n in range(5)]


def _text(
    x: float, y: float, text: str, *, size: int = 11, anchor: str = "start", fill: str = "#333333"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">'
        f"{escape(text)}</text>"
    )
