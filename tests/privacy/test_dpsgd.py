"""DP-SGD's step against one written out, and what no data set and no seed may change about it."""

from __future__ import annotations

import copy
import math
import random
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from zoo import MODELS, NEED_HOOKS, WITH_TOKENS, Noting, Small, examples, mlp

from fedipfs.privacy import noise
from fedipfs.privacy.base import GHOST, HOOKS, Mechanism
from fedipfs.privacy.dpsgd import PrivateGradients

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

KEY = bytes(range(16))
CASES = [
    (name, mode)
    for name in MODELS
    for mode in (GHOST, HOOKS)
    if mode == HOOKS or name not in NEED_HOOKS
]
NUMBERS = [name for name in MODELS if name not in WITH_TOKENS]


def flat(model: nn.Module) -> torch.Tensor:
    """The gradients of all trained parameters, as one vector in float64."""
    trained = [each for each in model.parameters() if each.requires_grad]
    return torch.cat([each.grad.flatten().double() for each in trained])


def gradients(task, x, y, *, model=None, source=None, mode=GHOST, physical=512, **mechanism):
    """The engine for `x` and `y`; without noise, batches of all, and divided by 1, as it stands."""
    model = task.model() if model is None else model
    told = {"noise_multiplier": 0.0, "clip_norm": 1.0, "sample_rate": 1.0, "batch_size": 1.0}
    return PrivateGradients(
        task,
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        task.inputs(x),
        task.targets(y),
        Mechanism(**told | mechanism),
        noise.generator() if source is None else source,
        mode,
        physical,
    )


def filled(task, x, y, chosen=None, **options) -> torch.Tensor:
    """One step's gradients."""
    with gradients(task, x, y, **options) as made:
        made.fill(chosen)
        return flat(made.model)


def clipped_sum(task, x, y, clip: float, model=None) -> torch.Tensor:
    """What the engine has to come to, by a pass for each example."""
    model = task.model() if model is None else model
    trained = [each for each in model.parameters() if each.requires_grad]
    total = torch.zeros(sum(each.numel() for each in trained), dtype=torch.float64)
    for i in range(len(y)):
        loss = task.loss(model(task.inputs(x[i : i + 1])), task.targets(y[i : i + 1]))
        found = torch.autograd.grad(loss, trained)
        own = torch.cat([each.flatten().double() for each in found])
        total += own * min(1.0, clip / max(own.norm().item(), 1e-12))
    return total


# ---- the sum


@settings(max_examples=60)
@given(
    case=st.sampled_from(CASES),
    count=st.integers(1, 12),
    clip=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    physical=st.integers(1, 13),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.01, 1.0, 10.0]),
)
def test_it_is_the_sum_of_the_examples_own_gradients_each_shortened(
    case, count, clip, physical, seed, scale
):
    name, mode = case
    task, (x, y) = Small(MODELS[name]), examples(name, count, seed, scale)
    found = filled(task, x, y, mode=mode, physical=physical, clip_norm=clip)
    wanted = clipped_sum(task, x, y, clip)
    assert (found - wanted).norm() <= 1e-4 * clip * count


WILD = [0.0, 1.0, -1e3, 1e18, 1e30, math.inf, -math.inf, math.nan]


@settings(max_examples=80)
@given(
    case=st.sampled_from([case for case in CASES if case[0] in NUMBERS]),
    count=st.integers(0, 9),
    values=st.lists(st.sampled_from(WILD), min_size=6, max_size=6),
    target=st.integers(0, 2),
    place=st.integers(0, 9),
    physical=st.integers(1, 10),
    clip=st.sampled_from([0.01, 1.0]),
)
def test_an_example_whatever_it_is_moves_the_sum_by_no_more_than_the_clipping_norm(
    case, count, values, target, place, physical, clip
):
    name, mode = case
    task, (x, y) = Small(MODELS[name]), examples(name, count)
    at = min(place, count)
    more = np.insert(x, at, np.array(values, np.float32), axis=0), np.insert(y, at, target)
    with np.errstate(all="ignore"):
        sums = [
            filled(task, *data, mode=mode, physical=physical, clip_norm=clip)
            for data in ((x, y), more)
        ]
    assert (sums[1] - sums[0]).norm() <= clip * (1 + 1e-4) + 1e-5 * count * clip


@pytest.mark.parametrize("mode", [GHOST, HOOKS])
@pytest.mark.parametrize("huge", [1e15, math.nan])
def test_weights_that_are_sent_to_single_out_an_example_do_not(mode, huge):
    """The coordinator makes the model: one in which few examples leave the range of floats."""
    task, (x, y) = Small(mlp), examples("perceptron", 8)
    model = task.model()
    with torch.no_grad():
        model[0].weight[0, 0] = huge
        model[2].weight[0, 0] = 1e30
    sums = [
        filled(task, x[:count], y[:count], model=model, mode=mode, clip_norm=1.0)
        for count in (7, 8)
    ]
    assert (sums[1] - sums[0]).norm() <= 1 + 1e-4


@pytest.mark.parametrize(("name", "mode"), CASES)
@pytest.mark.parametrize("physical", [1, 2, 3, 10, 11])
def test_how_many_go_through_the_model_at_once_changes_nothing(name, mode, physical):
    task, (x, y) = Small(MODELS[name]), examples(name, 10)
    whole = filled(task, x, y, mode=mode, clip_norm=0.3)
    parts = filled(task, x, y, mode=mode, clip_norm=0.3, physical=physical)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tied weights", "a layer twice"])
def test_weights_that_are_used_twice_are_refused_where_only_norms_are_computed(name):
    """The norm of a sum is not to be had from the norms of its parts."""
    with pytest.raises(NotImplementedError, match="used twice"):
        filled(Small(MODELS[name]), *examples(name, 4), mode=GHOST)


def test_no_more_than_so_many_go_through_the_model_at_once():
    sizes = []

    class Watched(nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            return x

    task = Small(lambda: nn.Sequential(Watched(), nn.Linear(6, 3)))
    x, y = examples("logistic", 10)
    filled(task, x, y, physical=4, mode=HOOKS)
    assert sum(sizes) == 10 and max(sizes) <= 4
    large = nn.Sequential(nn.Linear(6, 3), nn.Linear(2**20, 26, bias=False))
    images = nn.Sequential(nn.Conv2d(2**10, 2**14, 1, bias=False), nn.Flatten())
    for model, mode, most in (
        (task.model(), HOOKS, 512),
        (large, HOOKS, 2),  # 2^26 values of gradients
        (large, GHOST, 512),
        (images, GHOST, 4),  # there is no formula for these
    ):
        with gradients(task, x, y, model=model, mode=mode) as made:
            assert made.at_once == most


@pytest.mark.parametrize("mode", [GHOST, HOOKS])
def test_double_precision_is_kept(mode):
    task, (x, y) = Small(mlp, dtype=torch.float64), examples("perceptron", 9)
    with gradients(task, x, y, mode=mode, clip_norm=0.2) as made:
        made.fill()
        assert {each.grad.dtype for each in made.model.parameters()} == {torch.float64}
        found = flat(made.model)
    exact = clipped_sum(task, x, y, 0.2)
    assert (found - exact).norm() < 2e-5  # Opacus shortens by 1e-6 more
    drawn = filled(task, x, y, np.array([], int), mode=mode, noise_multiplier=1.0)
    assert (drawn != drawn.float().double()).all()


@pytest.mark.parametrize("mode", [GHOST, HOOKS])
def test_frozen_parameters_have_no_gradient_and_no_noise(mode):
    task, (x, y) = Small(MODELS["first layer frozen"]), examples("perceptron", 5)
    with gradients(task, x, y, mode=mode, noise_multiplier=1.0) as made:
        made.fill()
        assert [each.grad is None for each in made.model.parameters()] == [True, True, False, False]


@pytest.mark.parametrize("mode", [GHOST, HOOKS])
def test_dropout_is_one_draw_for_the_norm_and_for_the_gradient(mode):
    """Half of the values are dropped: a norm of other draws than the gradient's would show."""
    task = Small(lambda: nn.Sequential(nn.Linear(6, 40), nn.Dropout(0.5), nn.Linear(40, 3)))
    x, y = examples("perceptron", 1)
    model = task.model().train()
    norms = [filled(task, x, y, model=model, mode=mode, clip_norm=0.05).norm() for _ in range(20)]
    assert norms == pytest.approx([0.05] * 20, rel=1e-3)


# ---- the noise


@pytest.mark.parametrize("mode", [GHOST, HOOKS])
@pytest.mark.parametrize("chosen", [[], [0, 3]], ids=["nobody", "two"])
def test_noise_has_the_deviation_that_is_paid_for_also_where_nobody_is_drawn(mode, chosen):
    task, (x, y) = Small(lambda: nn.Linear(6, 3)), examples("logistic", 5)
    told = {"noise_multiplier": 1.5, "clip_norm": 0.2, "batch_size": 4.0}
    options = {"mode": mode, "source": noise.generator(KEY), **told}
    with gradients(task, x, y, **options) as made:
        drawn = []
        for _ in range(1000):
            made.fill(np.array(chosen, int))
            drawn.append(flat(made.model))
    without = filled(task, x, y, np.array(chosen, int), mode=mode, clip_norm=0.2, batch_size=4.0)
    each = (torch.stack(drawn) - without).numpy() / (1.5 * 0.2 / 4.0)  # (steps, parameters)
    assert stats.kstest(each.ravel(), "norm").pvalue > 1e-3
    # Parameters have noise of their own, and so have steps.
    between = np.corrcoef(each.T)[np.triu_indices(21, 1)]
    assert np.abs(between).max() < 5 / math.sqrt(1000)
    later = [np.corrcoef(each[:-1, i], each[1:, i])[0, 1] for i in range(21)]
    assert np.abs(later).max() < 5 / math.sqrt(1000)


@pytest.mark.parametrize("mode", [GHOST, HOOKS])
def test_the_noise_is_added_once_a_step_however_many_parts_it_has(mode):
    task, (x, y) = Small(lambda: nn.Linear(6, 3)), examples("logistic", 40)
    told = {"noise_multiplier": 3.0, "mode": mode}
    sums = [
        filled(task, x, y, source=noise.generator(KEY), physical=physical, **told)
        for physical in (1, 7, 512)
    ]
    for each in sums[:2]:  # equal keys: equal noise, and no more of it
        torch.testing.assert_close(each, sums[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [GHOST, HOOKS])
@pytest.mark.parametrize("count", [0, 1, 6])
def test_the_sum_is_divided_by_the_expected_size_not_by_the_batchs(mode, count):
    task, (x, y) = Small(mlp), examples("perceptron", 6)
    chosen = np.arange(count)
    whole, shared = (
        filled(task, x, y, chosen, mode=mode, batch_size=size, clip_norm=0.1) for size in (1.0, 2.5)
    )
    torch.testing.assert_close(shared, whole / 2.5)
    assert (whole.norm() > 0) == (count > 0)


@pytest.mark.parametrize("mode", [GHOST, HOOKS])
def test_no_seed_of_any_library_changes_noise_or_batches(mode):
    task, (x, y) = Small(mlp), examples("perceptron", 30)

    def step(key: bytes | None, seed: int) -> torch.Tensor:
        source = noise.generator(key)
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        told = {"noise_multiplier": 1.0, "sample_rate": 0.3, "mode": mode}
        return filled(task, x, y, source=source, **told)

    assert torch.equal(step(KEY, 1), step(KEY, 2))
    assert not torch.equal(step(None, 1), step(None, 1))


@pytest.mark.parametrize("mode", [GHOST, HOOKS])
def test_dropout_follows_from_the_secret_and_from_no_seed(mode):
    """With masks that others know, one example more would change those of all behind it."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(6, 40), nn.Dropout(0.5), nn.Linear(40, 3))

    task, x, y = Small(make), np.ones((5, 6), np.float32), np.zeros(5, np.int64)

    def step(key: bytes | None) -> torch.Tensor:
        torch.manual_seed(1)
        return filled(task, x, y, source=noise.generator(key), noise_multiplier=0.0, mode=mode)

    assert torch.equal(step(KEY), step(KEY))
    assert not torch.equal(step(None), step(None))


def test_a_step_leaves_torchs_generator_as_it_was():
    task, (x, y) = Small(mlp), examples("perceptron", 30)
    state = torch.get_rng_state()
    filled(task, x, y, noise_multiplier=1.0, sample_rate=0.3)
    assert torch.equal(torch.get_rng_state(), state)


# ---- the batches


class Tell(Small):
    """The gradient by weight i is 1 if example i is in the batch, else 0."""

    def __init__(self, count: int) -> None:
        super().__init__(lambda: nn.Linear(count, 1, bias=False), lambda output, _: output.mean())


def batches(count: int, steps: int, *, x=None, source=None, **mechanism) -> np.ndarray:
    """(steps, count): who was in which batch."""
    told = {"clip_norm": 2.0, **mechanism}
    y = np.zeros(count, np.int64)
    x = np.eye(count, dtype=np.float32) if x is None else x
    with gradients(Tell(count), x, y, source=source, **told) as made:
        drawn = []
        for _ in range(steps):
            made.fill()
            drawn.append(flat(made.model).numpy())
    return np.array(drawn)


def test_batches_are_drawn_as_poisson_sampling_draws():
    """Every example in every step by a coin of its own, of the rate that is paid for."""
    count, steps, rate = 12, 1500, 0.3
    drawn = batches(count, steps, source=noise.generator(KEY), sample_rate=rate)
    assert set(np.unique(drawn)) == {0.0, 1.0}
    sizes = np.bincount(drawn.sum(1).astype(int), minlength=count + 1)
    expected = stats.binom.pmf(np.arange(count + 1), count, rate) * steps
    common = expected >= 5
    assert common.sum() >= 6
    observed = [*sizes[common], sizes[~common].sum()]
    wanted = [*expected[common], expected[~common].sum()]
    assert stats.chisquare(observed, wanted).pvalue > 1e-3
    each = drawn.sum(0)
    assert stats.chisquare(each, np.full(count, each.mean())).pvalue > 1e-3
    assert stats.binomtest(int(drawn.sum()), count * steps, rate).pvalue > 1e-3
    together = np.corrcoef(drawn.T)[np.triu_indices(count, 1)]
    assert np.abs(together).max() < 5 / math.sqrt(steps)
    again = [np.corrcoef(drawn[:-1, i], drawn[1:, i])[0, 1] for i in range(count)]
    assert np.abs(again).max() < 5 / math.sqrt(steps)


def test_who_is_drawn_does_not_depend_on_the_data():
    told = {"sample_rate": 0.4}
    usual = batches(10, 50, source=noise.generator(KEY), **told)
    x = np.diag([1, 1, 1, 1, 1, 1, 1, 1, 1, 0.5]).astype(np.float32)
    other = batches(10, 50, x=x, source=noise.generator(KEY), **told)
    np.testing.assert_array_equal(other > 0, usual > 0)


def test_at_rate_one_everybody_is_in_every_batch():
    assert (batches(10, 20, sample_rate=1.0) == 1).all()


def test_a_batch_may_be_empty_and_nobody_asks_the_model_then():
    class Never(nn.Linear):
        def forward(self, x):
            raise AssertionError("asked")

    task, (x, y) = Small(lambda: nn.Sequential(Never(6, 3))), examples("logistic", 4)
    for mode in (GHOST, HOOKS):
        found = filled(task, x, y, mode=mode, sample_rate=1e-9, noise_multiplier=1.0)
        assert (found != 0).all()


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_steps_with_and_without_anybody_follow_each_other(name, mode):
    task, (x, y) = Small(MODELS[name]), examples(name, 6)
    with gradients(task, x, y, mode=mode, physical=4) as made:
        made.fill()
        first = flat(made.model)
        for chosen in ([], [1], [], [], range(6)):
            made.fill(np.array(chosen, int))
        assert torch.equal(flat(made.model), first)
        made.fill(np.array([], int))
        assert not flat(made.model).any()


# ---- what is left behind


def traces(model: nn.Module) -> dict[str, object]:
    """All that hangs on a model besides its tensors' values."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key == "_is_full_backward_hook":  # torch's own note of hooks that have been
                continue
            if "hooks" in key:
                value = len(value) if value is not None else None
            elif key in ("_parameters", "_buffers", "_modules"):
                value = list(value)
            elif isinstance(value, list | dict | torch.Tensor):
                value = type(value)
            found[f"{name}.{key}"] = value
    for name, parameter in model.named_parameters():
        found[f"{name}:"] = sorted(vars(parameter))
        found[f"{name}:hooks"] = len(parameter._backward_hooks or ())
    return found


class Fault(Exception):
    pass


@pytest.mark.parametrize(("name", "mode"), CASES)
@pytest.mark.parametrize("where", ["nowhere", "in the loss", "between steps"])
def test_the_model_is_left_as_it_came(name, mode, where):
    task, (x, y) = Small(MODELS[name]), examples(name, 6)
    model = task.model().train()
    before, values = traces(model), copy.deepcopy(model.state_dict())

    def loss(output, target):
        if where == "in the loss":
            raise Fault
        return nn.functional.cross_entropy(output, target)

    task.own_loss = loss
    try:
        with gradients(task, x, y, model=model, mode=mode, physical=4) as made:
            made.fill()
            made.fill(np.array([], int))
            if where == "between steps":
                raise Fault
    except Fault:
        assert where != "nowhere"
    model.zero_grad()
    assert traces(model) == before
    for key, value in model.state_dict().items():
        assert torch.equal(value, values[key])


@pytest.mark.parametrize("mode", [GHOST, HOOKS])
def test_what_a_layer_notes_of_its_inputs_does_not_stay(mode):
    """Running means and the like are sent with the weights, and get no noise."""
    task = Small(lambda: nn.Sequential(Noting(lambda seen, x: seen.copy_(x[-1])), nn.Linear(6, 3)))
    model, (x, y) = task.model().train(), examples("logistic", 5)
    filled(task, x, y, model=model, mode=mode)
    assert not model[0].seen.any()


@pytest.mark.parametrize("mode", [GHOST, HOOKS])
def test_what_fails_on_the_way_back_leaves_nothing_of_its_batch_for_the_next(mode):
    name = "LSTM of Opacus"
    task, (x, y) = Small(MODELS[name]), examples(name, 9)
    model = task.model()
    calls = []

    def fail(*args) -> None:  # at the second of three steps in time
        calls.append(1)
        if len(calls) == 2:
            raise Fault

    hook = model.recurrent.l0.hh.register_full_backward_hook(fail)
    with pytest.raises(Fault):
        filled(task, x[:2], y[:2], model=model, mode=mode)
    hook.remove()
    before = traces(task.model())
    assert traces(model) == before
    wanted = filled(task, x, y, mode=mode)
    torch.testing.assert_close(filled(task, x, y, model=model, mode=mode), wanted)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_model_can_be_trained_plainly_afterwards_and_privately_again(name, mode):
    task, (x, y) = Small(MODELS[name]), examples(name, 6)
    used = task.model()
    filled(task, x, y, model=used, mode=mode)
    for model in (used, fresh := task.model()):
        model.zero_grad()
        task.loss(model(task.inputs(x)), task.targets(y)).backward()
    assert torch.equal(flat(used), flat(fresh))
    told = {"noise_multiplier": 1.0, "sample_rate": 0.5, "mode": mode}
    again, first = (
        filled(task, x, y, model=model, source=noise.generator(KEY), **told)
        for model in (used, task.model())
    )
    assert torch.equal(again, first)


@pytest.mark.parametrize("mode", [GHOST, HOOKS])
@pytest.mark.parametrize("rule", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_any_optimizer_steps_on_what_was_filled(mode, rule):
    """It is its own afterwards: no wrapper, and its state is what these gradients give."""
    task, (x, y) = Small(mlp), examples("perceptron", 8)
    options = {"lr": 0.01, **({"momentum": 0.9} if rule == "SGD" else {})}
    model, other = task.model(), task.model()
    ours, theirs = (
        getattr(torch.optim, rule)(each.parameters(), **options) for each in (model, other)
    )
    told = Mechanism(1.0, 0.5, 0.5, 4.0)
    data = task.inputs(x), task.targets(y)
    with PrivateGradients(task, model, ours, *data, told, noise.generator(), mode) as made:
        for _ in range(4):
            made.fill()
            for mine, copied in zip(model.parameters(), other.parameters(), strict=True):
                copied.grad = mine.grad.clone()
            ours.step()
            theirs.step()
    for mine, copied in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, copied)
    ours.zero_grad()
    assert all(each.grad is None for each in model.parameters())


def test_models_in_several_threads_do_not_disturb_each_other():
    task, (x, y) = Small(mlp), examples("perceptron", 20)
    told = {"noise_multiplier": 1.0, "sample_rate": 0.5}
    wanted = filled(task, x, y, source=noise.generator(KEY), **told)
    found: list[torch.Tensor] = []

    def fill(model: nn.Module) -> None:
        found.append(filled(task, x, y, model=model, source=noise.generator(KEY), **told))

    threads = [threading.Thread(target=fill, args=[task.model()]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for each in found:
        assert torch.equal(each, wanted)
