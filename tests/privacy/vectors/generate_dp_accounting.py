"""Epsilons of dp-accounting for fixed histories, as JSON on stdout; see README.md."""

import json

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

ORDERS = range(2, 64)
# history of [noise multiplier, sample rate, steps], delta, interval of the grid of losses
CASES = [
    ([[1.0, 0.01, 1]], 1e-5, 1e-4),
    ([[1.0, 0.01, 10]], 1e-5, 1e-4),
    ([[1.0, 0.01, 1000]], 1e-5, 1e-4),
    ([[1.0, 0.01, 1000]], 1e-8, 1e-4),
    ([[1.0, 0.01, 10_000]], 1e-5, 3e-5),
    ([[1.0, 0.01, 100_000]], 1e-5, 1e-5),
    ([[0.6, 0.02, 300]], 1e-5, 1e-4),
    ([[0.8, 0.004, 15_000]], 1e-5, 3e-5),
    ([[1.1, 0.00427, 14_063]], 1e-5, 3e-5),
    ([[0.3, 0.001, 100]], 1e-5, 1e-4),
    ([[0.2, 0.0001, 20]], 1e-5, 1e-4),
    ([[0.5, 0.1, 2000]], 1e-5, 1e-4),
    ([[2.0, 0.05, 2000]], 1e-6, 1e-4),
    ([[4.0, 0.1, 5000]], 1e-6, 1e-4),
    ([[8.0, 0.1, 5000]], 1e-6, 1e-4),
    ([[8.0, 0.5, 500]], 1e-4, 1e-4),
    ([[20.0, 0.9, 200]], 1e-5, 1e-4),
    ([[50.0, 0.01, 100_000]], 1e-5, 3e-6),
    ([[1000.0, 0.5, 100_000]], 1e-6, 3e-6),
    ([[100.0, 0.001, 1000]], 1e-5, 1e-5),
    ([[10.0, 0.01, 200]], 1e-9, 1e-5),
    ([[1.0, 0.001, 1]], 1e-5, 1e-5),
    ([[1.5, 0.01, 200]], 1e-3, 1e-5),
    ([[1.0, 1.0, 1]], 1e-5, 1e-4),
    ([[1.0, 1.0, 50]], 1e-5, 1e-4),
    ([[4.0, 1.0, 50]], 1e-5, 1e-4),
    ([[100.0, 1.0, 3]], 1e-5, 1e-5),
    ([[0.5, 1.0, 100]], 1e-5, 1e-4),
    ([[1.0, 0.01, 500], [2.0, 0.05, 200]], 1e-5, 1e-4),
    ([[1.0, 0.01, 500], [8.0, 1.0, 5]], 1e-5, 1e-4),
    ([[0.7, 0.002, 400], [1.0, 0.01, 300], [1.3, 0.02, 200], [3.0, 0.2, 100]], 1e-6, 1e-4),
]


def spent(accountant, history, delta):
    for noise_multiplier, sample_rate, steps in history:
        event = GaussianDpEvent(noise_multiplier)
        if sample_rate < 1:
            event = PoissonSampledDpEvent(sample_rate, event)
        accountant.compose(event, steps)
    return accountant.get_epsilon(delta)


if __name__ == "__main__":
    cases = [
        {
            "history": history,
            "delta": delta,
            "pld": float(
                spent(PLDAccountant(value_discretization_interval=interval), history, delta)
            ),
            "rdp": float(spent(RdpAccountant(ORDERS), history, delta)),
        }
        for history, delta, interval in CASES
    ]
    lines = ",\n".join(json.dumps(case) for case in cases)
    print(f"[\n{lines}\n]")
