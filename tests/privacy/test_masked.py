"""Noise inside secure aggregation: what clients agree on, and what they refuse."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fedipfs.errors import BelowFloor, ConfigError
from fedipfs.privacy import distributed, masked
from fedipfs.privacy.masked import agreed, decode, encode, masks_for
from fedipfs.secagg import Parameters

SECAGG = {"threshold": None, "colluders": None, "dropouts": None}
PRIVACY = {"clip_norm": 1.0, "noise_multiplier": 2.0, "scale": None}
SEED = bytes(range(32))


def masks(clients: int = 10, **changed) -> Parameters:
    secagg = {key: changed.pop(key, None) for key in SECAGG}
    return masks_for(secagg, {**PRIVACY, **changed}, clients=clients, values=700, seed=SEED)


def with_details(terms: Parameters, **changed) -> Parameters:
    return dataclasses.replace(
        terms, details=tuple(sorted({**dict(terms.details), **changed}.items()))
    )


def test_those_who_may_pool_what_they_know_are_left_out_of_whose_noise_counts():
    assert agreed(masks())[0].survivors == 7 - 3
    assert agreed(masks(colluders=0.1))[0].survivors == 7 - 1
    assert agreed(masks(colluders=0.0))[0].survivors == 7


def test_all_that_decides_the_noise_is_in_what_everybody_signs():
    digests = {
        terms.digest()
        for terms in (
            masks(),
            masks(noise_multiplier=1.9),
            masks(clip_norm=0.9),
            masks(colluders=0.1),
            masks(scale=2.0**12),
            with_details(masks(), seed=bytes(32)),
        )
    }
    assert len(digests) == 6


def test_a_sum_of_what_clients_encode_is_that_of_their_clipped_updates():
    terms = masks(noise_multiplier=0.01)
    rng = np.random.default_rng(1)
    updates = [rng.normal(0, 0.02, 700).astype(np.float32) for _ in range(10)]
    total = np.sum([encode(terms, each) for each in updates], axis=0, dtype=np.uint32)
    found = decode(terms, total)
    error = np.linalg.norm(found - np.sum(updates, axis=0, dtype=np.float64))
    # The noise of ten, where four were to make it: sqrt(10 / 4) * 0.01 on each of 700 values.
    assert 0.5 < error / (0.01 * np.sqrt(10 / 4) * np.sqrt(700)) < 1.5


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"survivors": 5}, "less noise"),
        ({"survivors": 10}, "less noise"),
        ({"pooling": 4}, "less noise"),
        ({"pooling": -1}, "less noise"),
        ({"noise_multiplier": 0.0}, "without noise"),
        ({"dimension": 30_000}, "masked values"),
        ({"seed": b"short"}, "not agreed on"),
        ({"seed": "text"}, "not agreed on"),
    ],
)
def test_a_client_refuses_terms_with_less_noise_than_was_promised(changed, why):
    terms = with_details(masks(), **changed)
    with pytest.raises(BelowFloor, match=why):
        agreed(terms)
    with pytest.raises(BelowFloor, match=why):
        encode(terms, np.zeros(700, np.float32))


def test_terms_that_say_nothing_of_noise_are_refused():
    with pytest.raises(BelowFloor, match="not agreed on"):
        agreed(Parameters.choose(10, 700, encoding=masked.ENCODING))


def test_numbers_that_cannot_be_are_refused():
    for wrong in ({"scale": -1.0}, {"survivors": 0}):
        with pytest.raises(ConfigError):
            agreed(with_details(masks(), **wrong))


def test_more_survivors_than_the_quorum_cost_less_and_each_round_costs():
    terms = masks()
    one, all_ = (masked.epsilon(terms, [count], 1e-5) for count in (7, 10))
    assert 0 < all_ < one
    assert masked.epsilon(terms, [7, 7], 1e-5) > one
    noise, _ = agreed(terms)
    assert one == distributed.epsilon([(noise, 4)], 1e-5)


def test_a_site_pays_for_the_replacement_of_its_update():
    event = masked.event(masks())
    assert event[1:] == (1.0, 1)
    assert event.noise_multiplier == pytest.approx(2.0 / 2, rel=1e-3)
    assert event.noise_multiplier < 1.0
