"""Rényi curves: those of the subsampled Gaussian, and what a curve means in epsilon and delta."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln, logsumexp


class Event(NamedTuple):
    """`steps` releases of a sum of which each record moves at most `1 / noise_multiplier` sigmas.

    Each step samples every record with the probability `sample_rate` (Poisson sampling); 1 is the
    plain Gaussian mechanism.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


# Opacus' own, which end at 63, and more on both sides: below for an epsilon in the hundreds, above
# for one of hundredths.
ORDERS: tuple[float, ...] = (
    1.01,
    1.02,
    1.05,
    *(1 + x / 10 for x in range(1, 100)),
    *range(12, 64),
    *(round(64 * 2 ** (k / 4)) for k in range(17)),
)


def curve(history: Iterable[Event]) -> np.ndarray:
    """Rényi divergence of a whole history at each of ORDERS: float64; curves add up.

    Mironov, Talwar and Zhang 2019, "Rényi Differential Privacy of the Sampled Gaussian Mechanism",
    section 3.3. Infinite at fractional orders for a sampled Gaussian with a noise multiplier below
    0.03, whose epsilon is in the hundreds at least.
    """
    total = np.zeros(len(ORDERS))
    for event in history:
        total += event.steps * _step(event.noise_multiplier, event.sample_rate)
    return total


@lru_cache(maxsize=1024)
def _step(sigma: float, q: float) -> np.ndarray:
    orders = np.asarray(ORDERS)
    if q == 1:
        return orders / (2 * sigma**2)
    whole = orders == np.floor(orders)
    moments = np.full(len(orders), np.inf)
    moments[whole] = [_binomial(sigma, q, int(order)) for order in orders[whole]]
    if sigma >= 0.03:  # below, the integral would need too many points
        moments[~whole] = _integral(sigma, q, orders[~whole])
    return moments / (orders - 1)


def _binomial(sigma: float, q: float, order: int) -> float:
    """log E_Q[(P/Q)^order] at a whole order by the paper's binomial sum.

    What exceeds 1 is summed for itself, for it may be far less than what rounding leaves of 1.
    """
    i = np.arange(2, order + 1)
    exponent = i * (i - 1) / (2 * sigma**2)
    chosen = gammaln(order + 1) - gammaln(i + 1) - gammaln(order - i + 1)
    sampled = chosen + i * math.log(q) + (order - i) * math.log1p(-q)
    return float(np.logaddexp(0, logsumexp(sampled + exponent + np.log(-np.expm1(-exponent)))))


def _integral(sigma: float, q: float, orders: np.ndarray) -> np.ndarray:
    """log E_Q[(P/Q)^order] at any orders by the trapezoidal rule, to about 1e-13.

    The series of the paper, which Opacus sums, takes seconds where q is about one half.
    """
    width = min(sigma, sigma**2) / 2  # the integrand is analytic within pi sigma^2 of the real line
    x = np.arange(-10 * sigma, orders.max() + 10 * sigma, width)
    ratio = np.logaddexp(math.log1p(-q), math.log(q) + (x - 0.5) / sigma**2)
    normal = math.log(width / (sigma * math.sqrt(2 * math.pi))) - x**2 / (2 * sigma**2)
    return np.maximum(0, logsumexp(normal + orders[:, None] * ratio, axis=1))


def converted(
    divergences: np.ndarray, delta: float, orders: Iterable[float] = ORDERS
) -> tuple[float, float]:
    """The epsilon that a curve implies at `delta`, not below 0, and the order that gives it.

    Balle et al. 2020, "Hypothesis Testing Interpretations and Rényi Differential Privacy",
    theorem 21. Opacus' `get_privacy_spent` is the same formula, with a warning at the outer orders.
    """
    alpha = np.asarray(tuple(orders), np.float64)
    bounds = divergences + np.log1p(-1 / alpha) - (math.log(delta) + np.log(alpha)) / (alpha - 1)
    best = int(np.argmin(bounds))
    return max(0.0, float(bounds[best])), float(alpha[best])
