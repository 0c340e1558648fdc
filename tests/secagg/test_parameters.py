"""Parameters and graphs: what is chosen, what is refused, what everybody signs."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedipfs.errors import BadMessage, BelowFloor, ConfigError
from fedipfs.secagg import (
    Advertise,
    Confirm,
    Masked,
    Parameters,
    Record,
    Session,
    fixed,
    graph,
)
from fedipfs.secagg.graph import Graph
from fedipfs.secagg.record import Commitment


def test_a_cohort_of_ten():
    terms = Parameters.choose(10, 1_200_000, numbers=("weight",))
    assert (terms.threshold, terms.neighbours, terms.quorum) == (7, 9, 7)
    assert (terms.colluders, terms.dropouts, terms.complete) == (3, 3, True)
    assert terms.dimension == 1_200_000 + 9 * fixed.limbs(10)  # weight, and 8 counts
    assert terms.describe() == (
        "10 clients, complete graph, threshold 7, quorum 7: up to 3 may drop out and up to 3 "
        "collude with the coordinator; a sum holds at least 4 others"
    )


@pytest.mark.parametrize("clients", [3, 4, 5, 6, 7, 10, 33, 100])
def test_the_default_threshold_is_above_two_thirds(clients):
    terms = Parameters.choose(clients, 10)
    assert terms.threshold == 2 * clients // 3 + 1 <= clients
    assert terms.complete
    assert 2 * terms.quorum > clients + terms.colluders


def test_a_hundred_and_one_are_not_complete_unless_asked():
    assert not Parameters.choose(101, 10).complete
    assert Parameters.choose(101, 10, complete=True).complete
    assert not Parameters.choose(60, 10, complete=False).complete


# k and t of a k-regular graph at 2**-40 and 2**-20: n, share of colluders, of drop-outs, k, t.
KNOWN = [
    (100, 0.05, 0.1, 16, 6),
    (100, 0.2, 0.3, 48, 21),
    (1000, 0.05, 0.1, 36, 18),
    (1000, 0.2, 0.3, 140, 67),
    (10_000, 0.05, 0.1, 42, 21),
    (10_000, 0.2, 0.3, 182, 86),
]


@pytest.mark.parametrize(("clients", "collude", "drop", "k", "t"), KNOWN)
def test_k_and_t_of_known_cohorts(clients, collude, drop, k, t):
    found = graph.choose(clients, int(collude * clients), int(drop * clients), 40, 20)
    assert found == (k, t)


def test_tails_against_exact_fractions():
    for population, marked, drawn, least in [(99, 20, 48, 15), (30, 10, 5, 2), (50, 3, 10, 4)]:
        ways = sum(
            math.comb(marked, i) * math.comb(population - marked, drawn - i)
            for i in range(least, min(drawn, marked) + 1)
        )
        exact = math.log2(ways / math.comb(population, drawn)) if ways else -math.inf
        assert graph._tail(population, marked, drawn, least) == pytest.approx(exact)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": 2}, "among 2 clients: use 3 to 1800"),
        ({"clients": 1801}, "among 1801 clients"),
        ({"threshold": 5}, "threshold=5 of 10 clients: use 6 to 10"),
        ({"threshold": 11}, "threshold=11 of 10 clients"),
        ({"bits": 29}, "bits=29: sums over 10 clients would pass 32 bits; use at most 28"),
        ({"bits": 0}, "bits=0"),
        ({"bits": 33, "encoding": "x"}, "bits=33"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"clip": 1e-31}, "clip=1e-31"),
        ({"clip": math.inf}, "clip=inf"),
        ({"clip": math.nan}, "clip=nan"),
        ({"values": -1}, "values=-1"),
        ({"numbers": ("a", "a")}, "a name is there twice"),
        ({"numbers": ("",)}, "a name has 1 to 128"),
        ({"dropouts": 0.4}, "threshold 7 of 10 withstands 3 drop-outs, not 4"),
        ({"colluders": 0.4}, "threshold 7 of 10 withstands 3 colluders, not 4"),
        ({"colluders": 1.0}, "colluders=1.0: a share of the cohort"),
        ({"details": {"x": [1]}}, "details: x is a list"),
        ({"clients": 200, "threshold": 150}, "it is computed for a k-regular graph"),
        ({"clients": 200, "colluders": 0.5, "dropouts": 0.3}, "60 drop-outs leave 140 of 200"),
        (
            {"clients": 5, "complete": False, "colluders": 0.2, "dropouts": 0.2},
            "take the complete graph",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(options, message):
    given = {"clients": 10, "values": 100, **options}
    with pytest.raises(ConfigError, match=message):
        Parameters.choose(given.pop("clients"), given.pop("values"), **given)


def test_the_shares_that_a_complete_graph_withstands_are_accepted():
    assert Parameters.choose(10, 1, dropouts=0.4, threshold=6).dropouts == 4
    assert Parameters.choose(10, 1, dropouts=0.3, colluders=0.3).threshold == 7


def test_a_graph_that_is_not_safe_cannot_be_announced():
    terms = Parameters.choose(1000, 10)
    assert (terms.neighbours, terms.threshold, terms.quorum) == (36, 18, 526)
    for unsafe, message in (
        ({"threshold": 17}, "less than 40 bits secure"),
        ({"neighbours": 64}, "less than 40 bits secure"),
        ({"colluders": 60, "quorum": 531}, "less than 40 bits secure"),
        ({"colluders": 60}, "at most 51 can be withstood"),
        ({"neighbours": 35}, "or an even number"),
        ({"threshold": 37}, "threshold=37 of 36 neighbours"),
        ({"dropouts": 475}, "withstands at most 474"),
        ({"quorum": 500}, "quorum=500 of 1000 clients"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(terms, **unsafe)


# What everybody signs


def test_every_parameter_changes_the_hash():
    terms = Parameters.choose(10, 100, threshold=8, numbers=("weight",), details={"a": 1})
    terms = replace(terms, dropouts=1)
    changes = {
        "values": 101,
        "threshold": 7,
        "quorum": 9,
        "colluders": 1,
        "dropouts": 0,
        "clip": 2.0,
        "bits": 19,
        "encoding": "other",
        "numbers": ("loss",),
        "details": (("a", 2),),
    }
    found = {replace(terms, **{name: value}).digest() for name, value in changes.items()}
    assert len(found | {terms.digest()}) == len(changes) + 1
    assert Parameters.of(terms.plain()) == terms
    assert Parameters.of(terms.plain()).digest() == terms.digest()


def test_the_hash_of_known_parameters():
    assert Parameters.choose(10, 1000).digest().hex() == (
        "abfe0456e50749042f58571a1c768cd47c673f974d7aae39932995d4634f7a7a"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"clients": "10"},
        {"clients": True},
        {"clip": 1},
        {"numbers": "weight"},
        {"numbers": [1]},
        {"details": []},
        {"encoding": None},
        {"bits": -1},
        {"more": 1},
    ],
)
def test_parameters_of_other_types_are_refused(change):
    terms = Parameters.choose(10, 1000).plain()
    with pytest.raises((BadMessage, BelowFloor)):
        Parameters.of({**terms, **change})


def test_sessions():
    terms = Parameters.choose(3, 1)
    session = Session("run", 3, ("a", "b", "c"), terms, 2)
    assert Session.from_bytes(session.to_bytes()) == session
    assert (str(session), session.index("c")) == ("round 3 of run, attempt 2", 2)
    others = {
        replace(session, run="nur").digest,
        replace(session, round=4).digest,
        replace(session, attempt=0).digest,
        replace(session, cohort=("a", "b", "d")).digest,
        replace(session, parameters=replace(terms, clip=2.0)).digest,
        session.digest,
    }
    assert len(others) == 6
    for bad in (
        {"cohort": ("a", "b")},
        {"cohort": ("a", "c", "b")},
        {"cohort": ("a", "b", "b")},
        {"cohort": ("a", "b", "")},
        {"cohort": ("a", "b", "x" * 65)},
        {"cohort": ("a", "b", 3)},
        {"cohort": ("a", "b", "c\0d")},
        {"cohort": ["a", "b", "c"]},
        {"attempt": -1},
        {"attempt": True},
    ):
        with pytest.raises(BadMessage):
            replace(session, **bad)


def test_the_largest_record_fits_a_block():
    names = [f"{number:064}" for number in range(1800)]
    terms = Parameters.choose(1800, 1, complete=True, threshold=1800)
    some, signature = bytes(32), bytes(64)
    record = Record(
        Session("r" * 128, 1, tuple(names), terms).to_bytes(),
        tuple(Advertise(name, some, some, signature) for name in names),
        tuple(Commitment(name, some, some, some, signature) for name in names),
        tuple(Masked(name, some, "b" * 59, signature) for name in names),
        tuple(Confirm(name, some, signature) for name in names),
        (some,) * 1800,
        (),
    )
    assert Record.from_bytes(record.to_bytes()) == record


# Graphs


@given(st.integers(4, 60), st.data())
def test_a_graph_is_regular_symmetric_and_depends_on_the_seed(clients, data):
    neighbours = 2 * data.draw(st.integers(1, (clients - 2) // 2))
    made = Graph(clients, neighbours, data.draw(st.binary(min_size=32, max_size=32)))
    sets = [made.of(client) for client in range(clients)]
    for client, others in enumerate(sets):
        assert len(set(others)) == neighbours and client not in others
        assert others == sorted(others)
        assert all(client in sets[other] for other in others)


def test_a_complete_graph():
    made = Graph(5, 4, b"")
    assert [made.of(client) for client in range(5)] == [
        [other for other in range(5) if other != client] for client in range(5)
    ]
    assert made.connects([]) and made.connects([2])


def test_another_seed_is_another_graph():
    one, other = Graph(200, 16, b"1" * 32), Graph(200, 16, b"2" * 32)
    assert sum(one.of(client) == other.of(client) for client in range(200)) < 3


def test_connection_against_a_search():
    random.seed(5)
    for _ in range(300):
        clients = random.randint(5, 14)
        made = Graph(clients, 2 * random.randint(1, (clients - 2) // 2), random.randbytes(32))
        alive = random.sample(range(clients), random.randint(0, clients))
        assert made.connects(alive) == (parts(made, alive) <= 1)


def parts(made: Graph, alive: list[int]) -> int:
    group = {client: client for client in alive}

    def root(client: int) -> int:
        while group[client] != client:
            client = group[client]
        return client

    for one, other in combinations(alive, 2):
        if other in made.of(one):
            group[root(one)] = root(other)
    return len({root(client) for client in alive})


def test_cuts_are_no_more_likely_than_bounded():
    # 12 clients, k = 4, 6 removed: two pairs of neighbours on the ring must be among them.
    cut = total = 0
    made = Graph(12, 4, bytes(32))
    for removed in combinations(range(12), 6):
        total += 1
        cut += not made.connects([client for client in range(12) if client not in removed])
    assert 0 < cut / total <= 2 ** graph._cut(12, 4, 6)


def test_descriptions_of_other_graphs():
    assert Parameters.choose(1000, 1).describe() == (
        "1000 clients, 36-regular graph, threshold 18, quorum 526: up to 100 may drop out and up "
        "to 50 collude with the coordinator; if these also choose who drops out, they may see the "
        "sums of parts of the cohort"
    )
