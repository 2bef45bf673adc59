"""Draws a run as SVG: bars per mode."""

from __future__ import annotations

import statistics
from html import escape

#: Figure drawn per mode, and whether more is better.
_DRAWN = {
    "plain-64": ("requests_per_s", "requests/s, 64 connections"),
    "streams": ("requests_per_s", "streamed answers/s of 64 chunks"),
    "paced-200": ("cpu_us_per_chunk", "CPU microseconds per chunk, 200 streams"),
    "paced-1000": ("chunks_per_s", "chunks/s of 1,000 streams at 50/s"),
}
_COLOURS = {"ours": "#2563eb", "nginx": "#94a3b8"}
_BAR, _GAP, _LEFT, _WIDTH = 18, 6, 120, 420


def draw(results: dict[str, dict[str, dict[str, list[float]]]], machine: str) -> str:
    parts, top = [], 30
    for mode, (figure, title) in _DRAWN.items():
        values = {
            who: statistics.median(seen[figure])
            for who, seen in results.get(mode, {}).items()
            if who != "direct" and seen.get(figure)
        }
        if not values:
            continue
        parts.append(f'<text x="10" y="{top}" font-weight="bold">{escape(title)}</text>')
        top += 10
        most = max(values.values())
        for who, value in values.items():
            length = max(1.0, value / most * _WIDTH)
            colour = _COLOURS.get(who, "#cbd5e1")
            parts.append(f'<text x="{_LEFT - 8}" y="{top + 13}" text-anchor="end">{escape(who)}</text>')
            parts.append(f'<rect x="{_LEFT}" y="{top}" width="{length:.1f}" height="{_BAR}" fill="{colour}"/>')
            parts.append(f'<text x="{_LEFT + length + 6:.1f}" y="{top + 13}">{value:,.4g}</text>')
            top += _BAR + _GAP
        top += 24
    parts.append(f'<text x="10" y="{top}" font-size="10" fill="#64748b">{escape(machine)}</text>')
    width, height = _LEFT + _WIDTH + 100, top + 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )
