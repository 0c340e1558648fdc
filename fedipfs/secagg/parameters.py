"""What all participants of a round agree on before anything else, and what it withstands."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

from fedipfs.errors import BadMessage, BelowFloor, ConfigError
from fedipfs.ipld import dagcbor
from fedipfs.secagg import fixed, graph

FORMAT = "fedipfs-secagg-parameters/v1"
MIN_CLIENTS, MAX_CLIENTS = 3, 1800  # of more, a record might not fit into a block
SECURITY, CORRECTNESS = 40.0, 20.0  # bits, of a k-regular graph
UNIFORM = "uniform"  # the encoding of quantize.py

# What every client tells with the uniform encoding: its share of values beyond clip * 1, 2, 4, ...
CLIPPED = tuple(f"clipped/{1 << power}" for power in range(8))

Detail = int | float | str | bool | bytes


@dataclass(frozen=True)
class Parameters:
    """The parameters of a session; everybody signs their `digest`.

    clients    n, the size of the cohort, 3 to 1800
    values     coordinates of the model's vector
    numbers    names of the numbers that travel with it (fixed.py)
    threshold  t, the shares that give a secret back; in the complete graph the sharer holds one
    neighbours k, with how many each client masks and shares: n - 1, or an even number below
    quorum     how many must confirm one set of survivors before anyone helps to unmask it
    colluders  how many participants may work with a lying coordinator: together they learn no
               more than the sum of the others, of whom it holds at least quorum - colluders (in
               a k-regular graph, if the coordinator does not choose who drops out: see graph.py)
    dropouts   how many may drop out
    clip       values beyond this are clipped; what it means exactly is the encoding's to say
    bits       bits of a value in the encoding
    encoding   how values become uint32: "uniform" (quantize.py), or one that others define
    details    what else all must agree on, sorted by name

    Raises ConfigError for what cannot be right or is not safe: n < 3, t or a quorum that lets
    colluders split the cohort (t <= n/2 in the complete graph), sums that would pass 32 bits.
    """

    clients: int
    values: int
    threshold: int
    neighbours: int
    quorum: int
    colluders: int
    dropouts: int
    clip: float = 1.0
    bits: int = 20
    encoding: str = UNIFORM
    numbers: tuple[str, ...] = ()
    details: tuple[tuple[str, Detail], ...] = ()

    def __post_init__(self) -> None:
        _check_types(self)
        n, t, k, c = self.clients, self.threshold, self.neighbours, self.colluders
        if not MIN_CLIENTS <= n <= MAX_CLIENTS:
            raise ConfigError(
                f"secure aggregation among {n} clients: use {MIN_CLIENTS} to {MAX_CLIENTS}"
            )
        if not (k == n - 1 or (2 <= k < n - 1 and k % 2 == 0)):
            raise ConfigError(f"neighbours={k} of {n} clients: use {n - 1}, or an even number")
        if self.complete and not n < 2 * t <= 2 * n:
            raise ConfigError(f"threshold={t} of {n} clients: use {n // 2 + 1} to {n}")
        if not self.complete and not 1 <= t <= k:
            raise ConfigError(f"threshold={t} of {k} neighbours: use 1 to {k}")
        if not n < 2 * self.quorum <= 2 * n or (self.complete and self.quorum < t):
            raise ConfigError(f"quorum={self.quorum} of {n} clients: use {n // 2 + 1} to {n}")
        if c > 2 * self.quorum - n - 1 or (self.complete and c >= t):
            raise ConfigError(
                f"colluders={c}: with a quorum of {self.quorum} of {n} clients, at most "
                f"{2 * self.quorum - n - 1} can be withstood"
            )
        if self.dropouts > n - self.quorum:
            raise ConfigError(
                f"dropouts={self.dropouts}: a quorum of {self.quorum} of {n} clients withstands "
                f"at most {n - self.quorum}"
            )
        if not self.complete and graph.security(n, k, t, c) < SECURITY:
            raise ConfigError(
                f"threshold={t} of {k} neighbours is less than {SECURITY:g} bits secure against "
                f"{c} colluders among {n} clients: raise one of them, or take the complete graph"
            )
        if not 1 <= self.bits <= 32 or not 1e-30 <= self.clip <= 1e30:
            raise ConfigError(
                f"bits={self.bits}, clip={self.clip}: use 1 to 32 bits and a clip of 1e-30 to 1e30"
            )
        if self.encoding == UNIFORM and self.bits + (n - 1).bit_length() > 32:
            raise ConfigError(
                f"bits={self.bits}: sums over {n} clients would pass 32 bits; use at most "
                f"{32 - (n - 1).bit_length()}"
            )
        if len(set(self.numbers)) != len(self.numbers):
            raise ConfigError("numbers: a name is there twice")
        if list(dict(self.details)) != sorted(name for name, _ in self.details):
            raise ConfigError("details: sort them by name, each once")

    @property
    def complete(self) -> bool:
        """Whether everyone masks with everyone."""
        return self.neighbours == self.clients - 1

    @property
    def dimension(self) -> int:
        """Coordinates of a masked vector: values, then the limbs of all numbers."""
        return self.values + len(self.numbers) * fixed.limbs(self.clients)

    @classmethod
    def choose(
        cls,
        clients: int,
        values: int,
        *,
        threshold: int | None = None,
        colluders: float | None = None,
        dropouts: float | None = None,
        complete: bool | None = None,
        security: float = SECURITY,
        correctness: float = CORRECTNESS,
        clip: float = 1.0,
        bits: int = 20,
        encoding: str = UNIFORM,
        numbers: tuple[str, ...] = (),
        details: dict[str, Detail] | None = None,
    ) -> Parameters:
        """Parameters for a cohort; graph, threshold and quorum are computed.

        `colluders` and `dropouts` are shares of the cohort. Up to 100 clients, or if `complete`,
        the graph is complete: `threshold` floor(2n/3) + 1 unless given, as many colluders as that
        withstands, and n - threshold drop-outs; the shares, if given, are checked against these.
        Above, k and t follow from the shares (0.05 and 0.1 unless given), `security` and
        `correctness` in bits (graph.choose). Raises ConfigError.
        """
        for name, share in (("colluders", colluders), ("dropouts", dropouts)):
            if share is not None and not 0 <= share < 1:
                raise ConfigError(f"{name}={share}: a share of the cohort is from 0 to below 1")
        rest: dict[str, Any] = {"clip": float(clip), "bits": bits, "encoding": encoding}
        rest["numbers"] = numbers + (CLIPPED if encoding == UNIFORM else ())
        rest["details"] = tuple(sorted((details or {}).items()))
        if (clients <= graph.COMPLETE_UP_TO) if complete is None else complete:
            t = 2 * clients // 3 + 1 if threshold is None else threshold
            withstood = 2 * t - clients - 1
            chosen = cls(
                clients, values, t, clients - 1, t, max(withstood, 0), max(clients - t, 0), **rest
            )
            if colluders is not None and int(colluders * clients) > withstood:
                raise ConfigError(
                    f"threshold {t} of {clients} withstands {withstood} colluders, not "
                    f"{int(colluders * clients)}: raise the threshold"
                )
            if dropouts is not None and int(dropouts * clients) > clients - t:
                raise ConfigError(
                    f"threshold {t} of {clients} withstands {clients - t} drop-outs, not "
                    f"{int(dropouts * clients)}: lower the threshold, down to {clients // 2 + 1}"
                )
            return chosen
        if threshold is not None:
            raise ConfigError("threshold: it is computed for a k-regular graph, leave it out")
        collude = int((0.05 if colluders is None else colluders) * clients)
        drop = int((0.1 if dropouts is None else dropouts) * clients)
        quorum = (clients + collude) // 2 + 1
        if clients - drop < quorum:
            raise ConfigError(
                f"{drop} drop-outs leave {clients - drop} of {clients} clients, but {quorum} must "
                f"confirm the survivors where {collude} may collude: expect fewer of either"
            )
        k, t = graph.choose(clients, collude, drop, security, correctness)
        return cls(clients, values, t, k, quorum, collude, drop, **rest)

    def describe(self) -> str:
        """One line to show to the user: what was chosen, and what it withstands."""
        kind = "complete graph" if self.complete else f"{self.neighbours}-regular graph"
        held = (
            f"a sum holds at least {self.quorum - self.colluders} others"
            if self.complete
            else "if these also choose who drops out, they may see the sums of parts of the cohort"
        )
        return (
            f"{self.clients} clients, {kind}, threshold {self.threshold}, quorum {self.quorum}: up "
            f"to {self.dropouts} may drop out and up to {self.colluders} collude with the "
            f"coordinator; {held}"
        )

    def plain(self) -> dict[str, Any]:
        """The parameters as DAG-CBOR holds them."""
        found = dataclasses.asdict(self)
        return {**found, "numbers": list(self.numbers), "details": dict(self.details)}

    @classmethod
    def of(cls, found: Any) -> Parameters:
        """The parameters that `plain` gave. Raises BadMessage, BelowFloor if they are not safe."""
        names = {field.name for field in dataclasses.fields(cls)}
        if type(found) is not dict or found.keys() != names:
            raise BadMessage("parameters: expected a map with " + ", ".join(sorted(names)))
        if type(found["numbers"]) is not list or type(found["details"]) is not dict:
            raise BadMessage("parameters: expected a list of numbers and a map of details")
        details = tuple(sorted(found["details"].items()))
        try:
            return cls(**{**found, "numbers": tuple(found["numbers"]), "details": details})
        except ConfigError as error:
            raise BelowFloor(f"parameters that no site should accept: {error}") from None

    def digest(self) -> bytes:
        """SHA-256 of the canonical DAG-CBOR: what everybody signs."""
        return hashlib.sha256(dagcbor.encode({"format": FORMAT, **self.plain()})).digest()


def _check_types(found: Parameters) -> None:
    for name in (
        "clients",
        "values",
        "threshold",
        "neighbours",
        "quorum",
        "colluders",
        "dropouts",
        "bits",
    ):
        value = getattr(found, name)
        if type(value) is not int or not 0 <= value < 1 << 40:
            raise ConfigError(f"{name}={value!r:.80}: expected an integer, 0 or more")
    if type(found.clip) is not float:
        raise ConfigError(f"clip={found.clip!r:.80}: expected a float")
    names = (found.encoding, *found.numbers, *(name for name, _ in found.details))
    for text in names:
        if type(text) is not str or not 0 < len(text) <= 128 or not text.isprintable():
            raise ConfigError(f"{text!r:.80}: a name has 1 to 128 printable characters")
    for name, value in found.details:
        if type(value) not in (int, float, str, bool, bytes):
            raise ConfigError(f"details: {name} is a {type(value).__name__}")
