"""Secure aggregation against the helper functions of Flower's own, for the same work.

`python benchmarks/secagg.py`: masks, quantization, sharing and unmasking in turns with Flower's;
then CPU seconds of clients and server in whole rounds; then 1000 clients on a k-regular graph.
`python benchmarks/secagg.py ratios`, `rounds` or `thousand` for one of them.
"""

from __future__ import annotations

import os
import resource
import secrets
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from _common import interleave, row, timed, title
from flwr.common.secure_aggregation.crypto import shamir as flower_shamir
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import (
    pseudo_rand_gen,
    share_keys_plaintext_concat,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

from fedipfs.secagg import (
    Client,
    Floors,
    Journal,
    Parameters,
    Server,
    Session,
    decode,
    encode,
    keys,
    masks,
    shamir,
)
from fedipfs.secagg.messages import Signed
from fedipfs.trust import Identity, Member, Statement, TrustList, sign, verify

VALUES = 1_200_000
MODULUS = 1 << 32
NOW = datetime.now(UTC)


def main() -> None:
    """Measure and print."""
    parts = {"ratios": ratios, "rounds": rounds, "thousand": thousand}
    for name in sys.argv[1:] or parts:
        parts[name]()


def ratios() -> None:
    """Ours against Flower's helper functions."""
    title("the same work as Flower's helper functions", "medians of pairs in turn, one thread")
    for label, goal, pairs, ours, theirs in (
        (f"a mask on {VALUES:,} values", 5, 7, our_masks, flower_masks),
        (f"quantization of {VALUES:,} values to 20 bits", 5, 7, our_quantize, flower_quantize),
        ("share stage, n=50, t=34", 25, 3, our_share, flower_share),
        (f"recover and unmask, n=100, 10 dropped, {VALUES:,}", 30, 1, our_unmask, flower_unmask),
    ):
        times = interleave(ours(), theirs(), pairs)
        mine, other = times.medians
        row(f"{label}: ms", f"{mine * 1000:,.2f}")
        row("  Flower's, ms", f"{other * 1000:,.2f}")
        ratio = 1 / times.ratio
        row("  times faster", f"{ratio:.1f}x", f">= {goal}x", ratio >= goal)
        if goal == 30:
            row("  seconds", f"{mine:.2f}", "< 2", mine < 2)


def our_masks() -> Callable[[], float]:
    vector, key = np.zeros(VALUES, np.uint32), secrets.token_bytes(32)
    return lambda: timed(lambda: masks.apply(vector, [key]))


def flower_masks() -> Callable[[], float]:
    vector, key = [np.zeros(VALUES, np.int64)], secrets.token_bytes(32)

    def work() -> None:
        mask = pseudo_rand_gen(key, MODULUS, [(VALUES,)])
        parameters_mod(parameters_addition(vector, mask), MODULUS)

    return lambda: timed(work)


def update() -> np.ndarray:
    return (np.random.default_rng(1).standard_normal(VALUES) * 0.1).astype(np.float32)


def our_quantize() -> Callable[[], float]:
    parameters, values = Parameters.choose(10, VALUES), update()
    return lambda: timed(lambda: encode(parameters, values, {}))


def flower_quantize() -> Callable[[], float]:
    values = update()
    return lambda: timed(lambda: quantize([values], 1.0, 1 << 20))


SHARED, SHARED_T = 50, 34


def our_share() -> Callable[[], float]:
    mask, seal = secrets.token_bytes(32), keys.Agreement(secrets.token_bytes(32))
    others = [keys.public_of(secrets.token_bytes(32)) for _ in range(SHARED - 1)]
    binding = bytes(32)

    def work() -> None:
        points = range(1, SHARED + 1)
        seed = secrets.token_bytes(32)
        halves = [shamir.split(secret, SHARED_T, points) for secret in (seed, mask)]
        for other, one, two in zip(others, *(half[1:] for half in halves), strict=True):
            key = keys.derive(seal.exchange(other, "b"), "seal", binding, "a", "b")
            keys.seal(key, one + two, binding)

    return lambda: timed(work)


def flower_share() -> Callable[[], float]:
    own, seal = (private_key_to_bytes(generate_key_pairs()[0]) for _ in range(2))
    others = [public_key_to_bytes(generate_key_pairs()[1]) for _ in range(SHARED - 1)]

    def work() -> None:
        seeds = flower_shamir.create_shares(os.urandom(32), SHARED_T, SHARED)
        shares = flower_shamir.create_shares(own, SHARED_T, SHARED)
        for number, other in enumerate(others):
            key = generate_shared_key(bytes_to_private_key(seal), bytes_to_public_key(other))
            plain = share_keys_plaintext_concat(0, number, seeds[number], shares[number])
            encrypt(key, plain)

    return lambda: timed(work)


def our_unmask() -> Callable[[], float]:
    server = Cohort(100, VALUES, 1).play(gone=10).server
    return lambda: timed(server.result)


def flower_unmask() -> Callable[[], float]:
    # As SecAggPlusWorkflow.unmask_stage: 90 survivors, 10 who dropped out, threshold 67.
    pairs = [generate_key_pairs() for _ in range(100)]
    secret = [os.urandom(32)] * 90 + [private_key_to_bytes(pair[0]) for pair in pairs[90:]]
    one = flower_shamir.create_shares(secret[0], 67, 100)
    two = flower_shamir.create_shares(secret[90], 67, 100)
    shares = [one[:67]] * 90 + [two[:67]] * 10

    def work() -> None:
        total = [np.zeros(VALUES, np.int64)]
        for number, found in enumerate(shares):
            recovered = flower_shamir.combine_shares(found)
            if number < 90:
                mask = pseudo_rand_gen(recovered, MODULUS, [(VALUES,)])
                total = parameters_subtraction(total, mask)
                continue
            for other in range(90):
                key = generate_shared_key(bytes_to_private_key(recovered), pairs[other][1])
                mask = pseudo_rand_gen(key, MODULUS, [(VALUES,)])
                add = parameters_addition if other % 2 else parameters_subtraction
                total = add(total, mask)
        parameters_mod(total, MODULUS)

    return lambda: timed(work)


class Cohort:
    """All clients and the server of a round in one process: CPU seconds and bytes, by stage.

    Only the first `checked` clients verify signatures and are measured; on a k-regular graph they
    stand for all. Journals are on a disk that nobody waits for. Bytes are what a client sends and
    gets, without the model.
    """

    def __init__(self, clients: int, values: int, checked: int) -> None:
        identities = [Identity.new(f"site-{number:04}") for number in range(clients)]
        self.identities = {each.public.organization: each for each in identities}
        self.listed = TrustList(Member(each.public, "participant") for each in identities)
        self.parameters = Parameters.choose(clients, values, numbers=("weight",))
        self.session = Session("bench", 1, tuple(self.identities), self.parameters)
        self.names = list(self.identities)
        self.measured = set(self.names[:checked])
        self.server = Server(self.session, self.verify)
        self.folder = tempfile.TemporaryDirectory(prefix="fedipfs-bench-")
        self.update = np.random.default_rng(1).standard_normal(values).astype(np.float32) * 0.1
        self.clients: dict[str, list[float]] = defaultdict(list)
        self.coordinator: dict[str, float] = defaultdict(float)
        self.sent: dict[str, int] = {}
        self.got: dict[str, int] = {}

    def verify(self, organization: str, statement: Statement, signature: bytes) -> None:
        verify(self.listed, organization, "participant", statement, signature, NOW)

    def client(self, name: str) -> Client:
        own = self.identities[name]
        check = self.verify if name in self.measured else lambda *_: None
        journal = Journal(Path(self.folder.name) / name, self.session, durable=False)
        return Client(self.session, name, lambda said: sign(own, said), check, Floors(), journal)

    def play(self, gone: int = 0) -> Cohort:
        """All stages; the last `gone` clients drop out before they send their vectors."""
        server = self.server
        dropped = set(self.names[len(self.names) - gone :])
        self.got["advertise"] = len(self.session.to_bytes())
        self._stage("advertise", lambda client: client.advertise())
        roster = self._close("share", server.close_advertise)
        self._stage("share", lambda client: client.share(roster))
        deliveries = self._close("masked", server.close_share)
        vector = np.empty(0, np.uint32)

        def masked(client: Client) -> Signed:
            nonlocal vector
            vector = encode(self.parameters, self.update, {"weight": 600}).vector
            return client.mask(deliveries[client.name], vector, lambda _: client.name)

        self._stage("masked", masked, lambda: vector, dropped)
        survivors = self._close("confirm", server.close_masked)
        self._stage("confirm", lambda client: client.confirm(survivors))
        request = self._close("unmask", server.close_confirm)
        self._stage("unmask", lambda client: client.unmask(request))
        return self

    def finish(self) -> None:
        """Unmask the sum and look at it."""
        began = time.process_time()
        result = self.server.result()
        decode(self.parameters, result.total, len(result.record.survivors), per="weight")
        self.coordinator["unmask"] += time.process_time() - began

    def _stage(
        self,
        stage: str,
        answer: Callable[[Client], Signed],
        vector: Callable[[], np.ndarray | None] = lambda: None,
        without: Collection[str] = (),
    ) -> None:
        for name in self.server.missing():
            if name in without:
                continue
            began = time.process_time()
            message = answer(self.client(name))
            middle = time.process_time()
            self.server.take(message, vector())
            self.coordinator[stage] += time.process_time() - middle
            if name in self.measured:
                self.clients[stage].append(middle - began)
                found = vector()
                more = 0 if found is None else found.nbytes
                self.sent[stage] = len(message.to_bytes()) + more

    def _close(self, following: str, close: Callable[[], Any]) -> Any:
        began = time.process_time()
        closed = close()
        self.coordinator[self.server.stage] += time.process_time() - began
        told = closed[self.names[0]] if isinstance(closed, dict) else closed
        self.got[following] = len(told.to_bytes())
        return closed


def rounds() -> None:
    """Whole rounds in one process; the first warms up."""
    for clients, count, goal in ((10, 6, 25), (100, 1, None)):
        mine, theirs = [], []
        for _ in range(count):
            cohort = Cohort(clients, VALUES, clients).play()
            cohort.finish()
            mine.append(sum(statistics.median(each) for each in cohort.clients.values()))
            theirs.append(sum(cohort.coordinator.values()))
        title(f"a round of {clients} clients, {VALUES:,} values, CPU", cohort.parameters.describe())
        for who, seconds in (("a client", mine), ("the server", theirs)):
            least = min(seconds) * 1000
            met = None if goal is None else least <= goal
            row(f"{who}, ms (least of {count} rounds)", f"{least:.1f}", f"<= {goal}", met)
            row("  median, ms", f"{statistics.median(seconds) * 1000:.1f}")


def thousand() -> None:
    """A thousand clients on a k-regular graph, a tenth of whom drop out."""
    began = time.perf_counter()
    cohort = Cohort(1000, VALUES, 10).play(gone=100)
    cohort.finish()
    title(f"1000 clients, {VALUES:,} values, 100 drop out", cohort.parameters.describe())
    print(f"  {'stage':<12}{'client ms':>12}{'server ms':>12}{'sends B':>12}{'gets B':>12}")
    for stage, seconds in cohort.clients.items():
        mean, server = statistics.median(seconds) * 1000, cohort.coordinator[stage] * 1000
        sent, got = cohort.sent[stage], cohort.got[stage]
        print(f"  {stage:<12}{mean:>12.1f}{server:>12,.0f}{sent:>12,}{got:>12,}")
    row("all of it, simulated on one core: seconds", f"{time.perf_counter() - began:.0f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row("  peak memory of all clients and the server, MiB", f"{peak:,.0f}")


if __name__ == "__main__":
    main()
