"""The tasks that come with the package, the example in the documentation, and evaluation."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fedipfs import tasks
from fedipfs.clients import trainer
from fedipfs.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
TRAIN = {"batch_size": 16, "epochs": 1, "optimizer": {"name": "SGD", "lr": 0.1}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FEDIPFS_OFFLINE", "1")
    monkeypatch.delenv("FEDIPFS_DATA", raising=False)


@pytest.mark.parametrize(
    ("target", "parameters", "shape"),
    [
        ("fedipfs.tasks.vision:Mnist", 77_938, (1, 28, 28)),
        ("fedipfs.tasks.vision:MnistMcMahan", 1_663_370, (1, 28, 28)),
        ("fedipfs.tasks.vision:MnistLogistic", 7_850, (1, 28, 28)),
        ("fedipfs.tasks.small:Digits", 4_810, (8, 8)),
        ("fedipfs.tasks.small:BreastCancer", 530, (30,)),
    ],
)
def test_a_task_is_whole(target, parameters, shape):
    task = tasks.load(target)
    dataset = task.data(root=None, fallback="digits")
    model = task.model()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    few = slice(0, 7)
    x, y = task.inputs(dataset.train.inputs[few]), task.targets(dataset.train.targets[few])
    assert (x.dtype, x.shape, y.dtype) == (torch.float32, (7, *shape), torch.int64)
    output = model(x)
    loss = task.loss(output, y)
    assert loss.shape == () and loss.requires_grad
    assert task.metric in task.metrics(output, y)


def test_inputs_leave_the_data_set_as_it_is():
    task = tasks.load("fedipfs.tasks.vision:Mnist")
    images = np.full((3, 28, 28), 255, dtype=np.uint8)
    images.flags.writeable = False
    x = task.inputs(images)
    assert torch.allclose(x, torch.tensor((1 - 0.1307) / 0.3081))
    assert images.min() == 255
    assert task.inputs(np.zeros((1, 28, 28), np.uint8)).max() == pytest.approx(-0.1307 / 0.3081)


@pytest.mark.parametrize(
    ("target", "rounds", "least"),
    [("fedipfs.tasks.small:Digits", 15, 0.93), ("fedipfs.tasks.small:BreastCancer", 15, 0.92)],
)
def test_small_tasks_learn(target, rounds, least):
    task = tasks.load(target)
    dataset = task.data(root=None, fallback="error")
    torch.manual_seed(0)
    model = task.model()
    for server_round in range(1, rounds + 1):
        trainer.train(
            task,
            model,
            dataset.train.inputs,
            dataset.train.targets,
            config=TRAIN,
            seed=server_round,
            server_round=server_round,
        )
    test = dataset.test
    assert tasks.evaluate(task, model, test.inputs, test.targets, batch_size=64)["accuracy"] > least


def test_the_example_in_the_documentation(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tasks.md").read_text(), re.S)
    (tmp_path / "wine.py").write_text(code)
    task = tasks.load(f"{tmp_path}/wine.py:Wine", {"hidden": 32}, allowed=[f"{tmp_path}/"])
    dataset = task.data(root=None, fallback="error")
    model = task.model()
    config = {**TRAIN, "epochs": 20}
    trainer.train(
        task,
        model,
        dataset.train.inputs,
        dataset.train.targets,
        config=config,
        seed=1,
        server_round=1,
    )
    got = tasks.evaluate(task, model, dataset.test.inputs, dataset.test.targets, batch_size=10)
    assert got.keys() == {"loss", "accuracy", "confidence"}
    assert got["accuracy"] > 0.9


class Fixed(tasks.Task):
    """The output is the input; the loss is its mean."""

    def model(self):
        return torch.nn.Sequential(torch.nn.Identity(), torch.nn.Dropout(0.9))

    def data(self, *, root, fallback):
        raise NotImplementedError

    def loss(self, output, target):
        return output.mean()

    def metrics(self, output, target):
        return {"largest": float(output.max()), "share": (target == 1).float().mean()}


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 1000])
def test_evaluation_does_not_depend_on_the_batch_size(batch_size):
    values = np.arange(10, dtype=np.float32).reshape(10, 1)
    targets = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    got = tasks.evaluate(Fixed(), Fixed().model(), values, targets, batch_size=batch_size)
    assert got["loss"] == pytest.approx(4.5)  # no dropout
    assert got["share"] == pytest.approx(0.3)


def test_evaluation_leaves_the_model_as_it_is():
    model = torch.nn.BatchNorm1d(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    values = np.arange(10, dtype=np.float32).reshape(10, 1)
    tasks.evaluate(Fixed(), model, values, np.zeros(10, np.int64), batch_size=4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_evaluation_on_nothing_or_with_a_bad_setting_is_refused():
    task, model = Fixed(), Fixed().model()
    values, targets = np.zeros((2, 1), np.float32), np.zeros(2, np.int64)
    with pytest.raises(DataError, match="no examples"):
        tasks.evaluate(task, model, values[:0], targets[:0], batch_size=4)
    with pytest.raises(ConfigError, match=r"evaluate\.batch_size=0"):
        tasks.evaluate(task, model, values, targets, batch_size=0)
    with pytest.raises(ConfigError, match="cpu, cuda or auto"):
        tasks.evaluate(task, model, values, targets, batch_size=4, device="tpu")
