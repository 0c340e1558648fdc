"""Skellam noise: the difference of two Poisson variables, and what it hides.

Integers, so they survive arithmetic modulo 2^32 exactly; and sums of independent ones are Skellam
again, so that many clients' small shares make up one large noise (Agarwal, Kairouz and Liu 2021,
"The Skellam Mechanism for Differentially Private Federated Learning").
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fedipfs.privacy import rdp

# Whole ones, as the theorem has them; so far up because an epsilon of 1e-4 is best seen there.
ORDERS: tuple[int, ...] = (*range(2, 257), *(round(256 * 2 ** (k / 4)) for k in range(1, 49)))
# NumPy's Poisson sampler accepts by a difference of terms as large as mean * log(mean): in double
# precision, up to here, it errs by less than 1e-4 of an acceptance.
MOST_VARIANCE = 2.0**33


def sample(rng: np.random.Generator, variance: float, size: int) -> np.ndarray:
    """(size,) int64: independent Skellam noise of mean 0. ValueError above MOST_VARIANCE."""
    if not 0 <= variance <= MOST_VARIANCE:
        raise ValueError(f"a variance of {variance:.3g} is not between 0 and {MOST_VARIANCE:.3g}")
    noise = rng.poisson(variance / 2, size)
    noise -= rng.poisson(variance / 2, size)
    return noise


def curve(variance: float, l2: float, l1: float, orders: Iterable[float] = ORDERS) -> np.ndarray:
    """Upper bound of the Rényi divergence, at each of `orders`, of noise and noise that is moved.

    By an integer vector of norms up to `l2` and `l1`; `variance` is that of each coordinate, all
    in the same integer units. Float64; infinite for no noise. Agarwal et al. 2021, section 3: for
    whole orders; at others the tests find it true of every exact sum they try.
    """
    alpha = np.asarray(tuple(orders), np.float64)
    if variance == 0:
        return np.full(len(alpha), np.inf if l2 else 0.0)
    gaussian = alpha * l2**2 / (2 * variance)
    fine = ((2 * alpha - 1) * l2**2 + 6 * l1) / (4 * variance**2)
    return gaussian + np.minimum(fine, 3 * l1 / (2 * variance))


def dominating_gaussian(variance: float, l2: float, l1: float) -> float:
    """Noise multiplier of a plain Gaussian that costs at least as much as the noise; 0 for none.

    The arguments are those of `curve`, on or above which the Gaussian's lies at every order of this
    module and of the accountants: that is all that the `rdp` accountant looks at. It is hardly less
    than sqrt(variance) / l2 where a standard deviation is thousands of steps.

    The `prv` accountant needs more: that the Gaussian's privacy losses dominate. For any l2 up to
    2 * variance its noise multiplier is at most sqrt(variance / (1 + 0.75 / variance)) / l2; exact
    sums in the tests show that so much is enough for one coordinate that moves by eight standard
    deviations or less, and so it is for all of them together (Zhu, Dong and Wang 2022, "Optimal
    Accounting of Differential Privacy via Characteristic Function": dominating pairs compose).
    """
    orders = np.asarray((*rdp.ORDERS, *ORDERS), np.float64)
    return float(np.sqrt(np.min(orders / (2 * curve(variance, l2, l1, orders)))))
