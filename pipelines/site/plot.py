"""One claim as a picture: what is allowed, what was printed, what was measured, on one line."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from common.claims import Claim
from common.scoreboard import Row, measured

if TYPE_CHECKING:
    from markupsafe import Markup

WIDTH, HEIGHT = 340, 58
_LEFT, _RIGHT, _AXIS, _MIDDLE = 14, WIDTH - 14, 38, 20


def interval_plot(claim: Claim, row: Row) -> Markup | str:
    """Inline SVG: the expectation as a band, the printed number as a diamond, mean and interval as dot and whiskers.

    Colours come from the page's CSS, so that light and dark need one picture. Empty where nothing was measured.
    """
    from markupsafe import Markup

    if row.measured is None:
        return ""
    low, high = (row.low, row.high) if row.low is not None and row.high is not None else (row.measured, row.measured)
    band, printed = claim.band, claim.printed
    points = [low, high, row.measured, band.low, band.high]
    points += [] if printed is None else [(printed.low + printed.high) / 2]
    start, end = _range([point for point in points if math.isfinite(point)])

    def x(value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (min(max(value, start), end) - start) / (end - start)

    parts = [_band(x(band.low), x(band.high)), f'<line class="axis" x1="0" x2="{WIDTH}" y1="{_AXIS}" y2="{_AXIS}"/>']
    borders = sorted({edge for edge in (band.low, band.high) if math.isfinite(edge)})
    parts += [_border(x(edge), _text(edge)) for edge in _apart(borders, x)]
    if printed is not None:
        parts.append(_diamond(x((printed.low + printed.high) / 2)))
    parts.append(_whiskers(x(low), x(row.measured), x(high), row.verdict.replace(" ", "-")))
    label = Markup.escape(
        f"expected {band}; measured {measured(row)}" + (f"; printed {claim.claimed}" if printed else "")
    )
    return Markup(
        f'<svg class="interval" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}"><title>{label}</title>'
        + "".join(parts)
        + "</svg>"
    )


def _range(points: list[float]) -> tuple[float, float]:
    low, high = min(points), max(points)
    pad = 0.15 * (high - low) or 0.1 * abs(low) or 1.0
    return low - pad, high + pad


def _apart(borders: list[float], x) -> list[float]:
    """Borders whose labels would touch are one border to the eye: the first stands for both."""
    return borders[:1] if len(borders) == 2 and x(borders[1]) - x(borders[0]) < 48 else borders


def _band(left: float, right: float) -> str:
    # A band that ends at the range's edge goes on beyond it, so it is drawn to the picture's edge.
    left, right = (0.0 if left <= _LEFT else left), (float(WIDTH) if right >= _RIGHT else right)
    return f'<rect class="band" x="{left:.1f}" y="4" width="{max(right - left, 2):.1f}" height="{_AXIS - 4}"/>'


def _border(x: float, text: str) -> str:
    # Labels near an end are anchored there: centred, they would leave the picture.
    anchor = "start" if x < 30 else "end" if x > WIDTH - 30 else "middle"
    return (
        f'<line class="border" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{_AXIS + 4}"/>'
        f'<text x="{x:.1f}" y="{HEIGHT - 5}" text-anchor="{anchor}">{text}</text>'
    )


def _diamond(x: float) -> str:
    y, r = _MIDDLE, 6
    return f'<path class="printed" d="M{x - r:.1f} {y}L{x:.1f} {y - r}L{x + r:.1f} {y}L{x:.1f} {y + r}Z"/>'


def _whiskers(low: float, mean: float, high: float, kind: str) -> str:
    y = _MIDDLE
    caps = "".join(f'<line x1="{end:.1f}" x2="{end:.1f}" y1="{y - 5}" y2="{y + 5}"/>' for end in (low, high))
    bar = f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>{caps}' if high > low else ""
    return f'<g class="measured {kind}">{bar}<circle cx="{mean:.1f}" cy="{y}" r="4.5"/></g>'


def _text(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")
