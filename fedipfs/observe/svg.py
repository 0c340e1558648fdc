"""Line charts as inline SVG: text in, text out, coloured by the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from fedipfs.observe.summary import metric

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 34
_DOTS = 60  # with more points than this the line alone is drawn


@dataclass(frozen=True)
class Series:
    """One line: a label and (round, value) points in order."""

    label: str
    points: Sequence[tuple[int, float]]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that enclose [low, high] (D3's 1-2-5 steps)."""
    if high - low <= max(1e-12 * max(abs(low), abs(high)), 1e-300):
        pad = abs(low) * 0.05 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def line_chart(
    ident: str,
    title: str,
    series: Sequence[Series],
    *,
    from_zero: bool = False,
    show: Callable[[float], str] = metric,
) -> str:
    """One chart of up to four series over rounds; "" where no point is finite.

    Args:
        ident: unique on the page, for the ids of the title and the description.
        title: what the vertical axis shows.
        from_zero: the axis begins at zero (times), else near the smallest value (metrics).
        show: writes a value for people.
    """
    drawn = [Series(line.label, _finite(line.points)) for line in series]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return ""
    values = [value for line in drawn for _, value in line.points]
    rounds = [number for line in drawn for number, _ in line.points]
    ticks = nice_ticks(0.0 if from_zero else min(values), max(values))
    first, last = min(rounds), max(rounds)

    def x(number: float) -> float:
        inner = WIDTH - LEFT - RIGHT
        return LEFT + inner * ((number - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (ticks[-1] - value) / (ticks[-1] - ticks[0])

    step = ticks[1] - ticks[0]
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{ident}-t {ident}-d">',
        f'<title id="{ident}-t">{escape(title)} by round</title>',
        f'<desc id="{ident}-d">{escape(_describe(drawn, show))}</desc>',
    ]
    for tick in ticks:
        at = y(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}">{_label(tick, step)}</text>'
        )
    for number in _round_ticks(first, last):
        at = x(number)
        parts.append(f'<text class="tick mid" x="{at:.1f}" y="{HEIGHT - 14}">{number}</text>')
    for index, line in enumerate(drawn):
        points = [(x(number), y(value)) for number, value in line.points]
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
        parts.append(f'<g class="s{index % 4}"><path class="line" d="M{path}"/>')
        if len(points) <= _DOTS:
            parts += [
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5"><title>'
                f"{escape(line.label)}, round {number}: {show(value)}</title></circle>"
                for (px, py), (number, value) in zip(points, line.points, strict=True)
            ]
        parts.append("</g>")
    parts.append("</svg>")
    keys = "".join(
        f'<span class="s{index % 4}"><i></i>{escape(line.label)} '
        f"<b>{show(line.points[-1][1])}</b></span>"
        for index, line in enumerate(drawn)
    )
    heading = f'<figcaption><h3>{escape(title)}</h3><div class="keys">{keys}</div></figcaption>'
    return f"<figure>{heading}{''.join(parts)}</figure>"


def _finite(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(number, value) for number, value in points if abs(value) < 1e300]  # nor NaN


def _describe(series: Sequence[Series], show: Callable[[float], str]) -> str:
    return "; ".join(
        f"{line.label}: {show(line.points[0][1])} in round {line.points[0][0]}, "
        f"{show(line.points[-1][1])} in round {line.points[-1][0]}"
        for line in series
    )


def _label(tick: float, step: float) -> str:
    """A tick with as many decimals as its axis needs."""
    if max(abs(tick), step) >= 1e5 or step < 1e-5:
        return f"{tick:.3g}"
    decimals = next(d for d in range(9) if abs(round(step, d) - step) < step * 1e-6)
    return f"{tick:.{decimals}f}"


def _round_ticks(first: int, last: int) -> list[int]:
    """Whole round numbers under the axis, at most about ten; the first and last among them."""
    step = max(1, next(s for s in _steps() if (last - first) / s <= 10))
    inner = [number for number in range(step, last, step) if number > first]
    inner = [number for number in inner if min(number - first, last - number) * 2 >= step]
    return sorted({first, *inner, last})


def _steps() -> list[int]:
    return [factor * 10**power for power in range(10) for factor in (1, 2, 5)]
