"""Privacy loss random variables, composed by FFT: the tight epsilon of a history.

A step's privacy loss is L = log(P(x) / Q(x)) for x from P, with P = (1 - q) N(0, s^2) + q N(1, s^2)
the release with a record and Q = N(0, s^2) the one without. (To add a record, which exchanges P and
Q, has cost less wherever it was tried; Opacus does not look at it either.) Losses of independent
steps add, so their distributions convolve (Koskela et al. 2020, "Computing Tight Differential
Privacy Guarantees Using FFT"; Gopi et al. 2021, "Numerical Composition of Differential Privacy").

Opacus' PRVAccountant rounds each loss to the nearest point of a grid and adds the error that this
may make to its answer: for 1e-3 in epsilon it takes seconds at 1000 steps and 1.5e8 points at 1e5.
Here each cell's mass is divided between its two ends such that P and Q both keep theirs
(Doroshenko et al. 2022, "Connect the Dots: Tighter Discrete Approximations of Privacy Loss
Distributions"): what results dominates the true pair, so no epsilon from it is ever too small, and
exceeds it by a term of second order in the step of the grid.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.signal import lfilter
from scipy.special import ndtr, ndtri

from fedipfs.privacy.rdp import ORDERS, Event, converted, curve

_EXCESS = 1e-5  # what the grid may add to epsilon
_TAIL = 1e-6  # share of delta that may lie beyond a grid
_POINTS = 1 << 22  # of a grid: 32 MiB a copy; where more were needed, the excess grows instead
_LARGEST = 500.0  # privacy loss whose exponential is computed
_TILT = 0.8  # of the tilt that moves the mean to epsilon; more than it would be hard to bound
_ROUNDING = 1e-5  # share of delta that rounding errors may be
_WIDEST = 2e-4  # step of a grid


class _Grid(NamedTuple):
    step: float
    lowest: int  # index of the first point: a loss of lowest * step
    points: int


def epsilon(history: tuple[Event, ...], delta: float) -> float:
    """An upper bound of epsilon at `delta`; infinite where it cannot be computed this way."""
    divergences = curve(history)
    bound, order = converted(divergences, delta)
    if bound == 0 or bound > _LARGEST:
        return math.inf if bound else 0.0
    steps = sum(event.steps for event in history)
    # The masses are weighted by exp(tilt * loss), and back at the end. This moves the bulk to where
    # epsilon is, nearly: rounding errors, about 1e-16 of it, would hide a small delta otherwise.
    tilt, log_mass, beyond = _TILT * (order - 1), 0.0, 0.0
    grid = _grid(divergences, steps, bound, tilt, delta * _TAIL)
    spectrum: np.ndarray | float = 1.0
    for event in history:
        indices, masses, lost = _discretized(event, grid.step, delta * _TAIL / steps)
        weighted = masses * np.exp(tilt * (indices * grid.step))
        mass = float(weighted.sum())
        around = np.bincount(indices % grid.points, weighted / mass, grid.points)
        spectrum = spectrum * rfft(around) ** event.steps
        log_mass += event.steps * math.log(mass)
        beyond += event.steps * lost
    tilted = np.roll(irfft(spectrum, grid.points), -(grid.lowest % grid.points))
    target = delta * (1 - _TAIL - _ROUNDING) - beyond
    if target <= 0:
        return math.inf
    # Ten times the rounding errors that were seen in sums over masses that should be zero.
    seen = min(1e-13, 1e-15 + 1e-17 * steps) / _ROUNDING
    return _solved(tilted, grid, tilt, math.log(target) - log_mass, seen)


def _grid(divergences: np.ndarray, steps: int, epsilon: float, tilt: float, tail: float) -> _Grid:
    """A grid that the sum of all losses leaves with probability `tail` at most, on either side.

    Dividing a cell of width h between its ends multiplies the moment of order a by
    exp(a (a - 1) h^2 / 8) at most, and by two thirds of this exponent on average over the cell.
    """
    far, alpha = -math.log(tail), np.asarray(ORDERS)
    step = min(_WIDEST, math.sqrt(12 * _EXCESS / ((1 + tilt / _TILT) * steps)))
    while True:  # Chernoff's bound on both sides: E[exp((a - 1) loss)] and E[exp(-a loss)]
        moments = (alpha - 1) * (divergences + alpha * steps * step**2 / 8)
        lowest = -min(far, float(np.min((moments + far) / alpha)))
        width = float(np.min((moments + far) / (alpha - 1))) - lowest
        # What leaves on the right comes back on the left, made heavier by the tilt. That it comes
        # as far as epsilon would never make the answer too small, but larger than it need be.
        room = alpha - 1 - tilt
        again = (moments - (alpha - 1) * epsilon / 2 + far)[room > 0] / room[room > 0]
        width = max(width, float(again.min()))
        points = math.ceil(width / step) + 2
        if points <= _POINTS:
            return _Grid(step, math.floor(lowest / step), next_fast_len(points, real=True))
        step *= 1.05 * points / _POINTS


def _discretized(event: Event, step: float, tail: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Indices of grid points (int64), P's mass at each, and beyond the last: hardly over `tail`."""
    sigma, q = event.noise_multiplier, event.sample_rate
    least = sigma * ndtri(tail)
    most = max(-sigma * ndtri(tail / 2), 1 - sigma * ndtri(min(0.5, tail / (2 * q))))
    low, high = (
        float(np.logaddexp(math.log1p(-q) if q < 1 else -np.inf, math.log(q) + exponent))
        for exponent in ((2 * least - 1) / (2 * sigma**2), (2 * most - 1) / (2 * sigma**2))
    )
    indices = np.arange(math.floor(low / step), math.ceil(min(high, _LARGEST) / step) + 1)
    losses = indices * step
    x = _release(losses, sigma, q)
    without, beyond = _masses(x / sigma)
    within, further = _masses((x - 1) / sigma)
    # To the right end goes (P - exp(left) Q) / (1 - exp(-step)) of a cell's masses P and Q.
    gain = q * (within - without) - np.expm1(losses[:-1]) * without
    mass = (1 - q) * without + q * within
    right = np.clip(gain / -math.expm1(-step), 0, mass)
    masses = np.zeros(len(indices))
    masses[:-1] += mass - right
    masses[1:] += right
    masses[0] += (1 - q) * ndtr(x[0] / sigma) + q * ndtr((x[0] - 1) / sigma)
    return indices, masses, (1 - q) * beyond + q * further


def _release(losses: np.ndarray, sigma: float, q: float) -> np.ndarray:
    """The x at which the privacy loss is each of `losses`; -inf where it is nowhere as small."""
    if q == 1:
        return sigma**2 * losses + 0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.log(np.maximum(1 + np.expm1(np.minimum(losses, 0)) / q, 0))
        above = losses + np.log1p((q - 1) * np.exp(-np.maximum(losses, 0))) - math.log(q)
    return sigma**2 * np.where(losses > 0, above, below) + 0.5


def _masses(z: np.ndarray) -> tuple[np.ndarray, float]:
    """Standard normal mass between neighbours of increasing z, and above the last."""
    lower, upper = ndtr(z), ndtr(-z)
    mass = np.where(z[:-1] > 0, upper[:-1] - upper[1:], lower[1:] - lower[:-1])
    return mass, float(upper[-1])


def _solved(tilted: np.ndarray, grid: _Grid, tilt: float, log_target: float, seen: float) -> float:
    """The least epsilon whose delta, the sum of P(l) (1 - exp(epsilon - l)) over l > epsilon, fits.

    In units of what the tilt made of a mass at each point, for no factor to overflow. Where delta
    is less than `seen` of them it drowns in rounding errors: no epsilon is looked for there.
    """
    backwards = tilted[::-1]
    p, q = (
        lfilter([1.0], [1.0, -math.exp(-rate * grid.step)], backwards)[::-1]
        for rate in (tilt, tilt + 1)
    )
    losses = (grid.lowest + np.arange(grid.points)) * grid.step
    with np.errstate(over="ignore"):
        allowed = np.exp(log_target + tilt * losses)
    first = int(np.searchsorted(allowed, seen))
    over = np.flatnonzero(p[first:] - q[first:] > allowed[first:])
    at = first + int(over[-1]) + 1 if len(over) else first
    if at >= grid.points:
        return math.inf
    if not len(over):
        return max(0.0, float(losses[at]))
    return max(0.0, float(losses[at] + math.log((p[at] - allowed[at]) / q[at])))
