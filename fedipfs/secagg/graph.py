"""Who masks with whom, and holds whose shares: a complete graph, or a k-regular one.

The k-regular graph is that of SecAgg+ (Bell et al. 2020, "Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead", section 3): Harary's graph on a random permutation of all clients. They
stand in a ring and everyone's neighbours are the k/2 next on either side. The permutation comes
from a seed that all advertised keys went into.

What k-regular graphs do not withstand: a coordinator who chooses who drops out can cut the ring
with the help of colluders in the right places, and see the sum of every part, in which everyone
has t holders of shares left; and one with colluders can try many of their keys, for a seed that
puts them there. Whoever fears that takes the complete graph, which is possible for any number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from typing import NamedTuple

from fedipfs.errors import ConfigError

COMPLETE_UP_TO = 100  # clients


class Graph:
    """The graph of a round over clients 0 to n - 1; `seed` (32 bytes) matters if k < n - 1."""

    def __init__(self, clients: int, neighbours: int, seed: bytes) -> None:
        self.clients, self.neighbours = clients, neighbours
        self.complete = neighbours == clients - 1
        if self.complete:
            self._ring = list(range(clients))
        else:
            # Sorting by hashes is a uniform permutation: two of them never are equal.
            hashes = [hashlib.sha256(seed + i.to_bytes(4, "big")).digest() for i in range(clients)]
            self._ring = sorted(range(clients), key=hashes.__getitem__)
        self._place = {client: place for place, client in enumerate(self._ring)}

    def of(self, client: int) -> list[int]:
        """The k neighbours of a client, sorted."""
        if self.complete:
            return [other for other in self._ring if other != client]
        place, reach = self._place[client], self.neighbours // 2
        steps = [*range(-reach, 0), *range(1, reach + 1)]
        return sorted(self._ring[(place + step) % self.clients] for step in steps)

    def connects(self, alive: Collection[int]) -> bool:
        """Whether those alive are one component: masks then hide all but the sum of all of them."""
        if self.complete:
            return True
        places = sorted(self._place[client] for client in alive)
        following = [*places[1:], places[0] + self.clients] if places else []
        steps = (after - place for place, after in zip(places, following, strict=True))
        return sum(step > self.neighbours // 2 for step in steps) <= 1


class Choice(NamedTuple):
    """Neighbours k and threshold t of a k-regular graph."""

    neighbours: int
    threshold: int


def choose(
    clients: int, colluders: int, dropouts: int, security: float, correctness: float
) -> Choice:
    """The least even k, and for it the least t, that keep three chances small.

    Over all clients, that one has t or more of the `colluders` among its k neighbours, and that
    colluders and drop-outs cut the graph: at most 2**-security. That one has fewer than t
    neighbours that stay: at most 2**-correctness (Bell et al. 2020, section 3.2: who is a neighbour
    of whom is hypergeometric). Raises ConfigError where no k below n - 1 does.
    """
    for neighbours in range(2, clients - 1, 2):
        threshold = _threshold(clients, neighbours, colluders, security)
        if (
            threshold <= neighbours
            and _cut(clients, neighbours, colluders + dropouts) <= -security
            and -_strays(clients, neighbours, threshold, dropouts) >= correctness
        ):
            return Choice(neighbours, threshold)
    raise ConfigError(
        f"no graph with fewer edges than the complete one has {security:g} bits of security and "
        f"{correctness:g} of correctness for {clients} clients of whom {colluders} collude and "
        f"{dropouts} drop out: take the complete graph, or expect fewer of either"
    )


def security(clients: int, neighbours: int, threshold: int, colluders: int) -> float:
    """Bits of security against `colluders` that some client has them as t of its k neighbours."""
    return -math.log2(clients) - _tail(clients - 1, colluders, neighbours, threshold)


def _threshold(clients: int, neighbours: int, colluders: int, bits: float) -> int:
    low, high = 1, neighbours + 1  # the chance falls with t, and t = k + 1 has none
    while low < high:
        middle = (low + high) // 2
        if security(clients, neighbours, middle, colluders) >= bits:
            high = middle
        else:
            low = middle + 1
    return low


def _strays(clients: int, neighbours: int, threshold: int, dropouts: int) -> float:
    """log2 of a bound on the chance that some client is left with fewer than t neighbours."""
    gone = neighbours - threshold + 1
    return math.log2(clients) + _tail(clients - 1, dropouts, neighbours, gone)


def _cut(clients: int, neighbours: int, removed: int) -> float:
    """log2 of a bound on the chance that a ring is cut: k/2 in a row removed, at two places."""
    places = math.log2(clients * (clients - 1) / 2)
    return places + _tail(clients, removed, neighbours, neighbours)


def _tail(population: int, marked: int, drawn: int, least: int) -> float:
    """log2 of the chance that at least `least` of those drawn are marked; -inf for none."""
    low, high = max(least, drawn - (population - marked), 0), min(drawn, marked)
    if low > high:
        return -math.inf
    everything = _log_choose(population, drawn)
    logs = [
        _log_choose(marked, i) + _log_choose(population - marked, drawn - i) - everything
        for i in range(low, high + 1)
    ]
    top = max(logs)
    return (top + math.log(sum(math.exp(one - top) for one in logs))) / math.log(2)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
