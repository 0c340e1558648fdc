"""FedSGD: clients answer gradients, and the server's optimizer makes the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedipfs.errors import ConfigError, Diverged
from fedipfs.exchange import StoredArrays, from_numpy, from_torch, specs_of, store_arrays, to_torch
from fedipfs.strategies.base import ClientUpdate, StoreStrategy
from fedipfs.strategies.mean import Mean
from fedipfs.tasks import Task, optim
from fedipfs.tasks.names import trained

_KEY = "strategy.optimizer"


class FedSGD(StoreStrategy):
    """w_{t+1} = Step(w_t, g),  g = sum_k (n_k / sum_j n_j) grad F_k(w_t).

    F_k is the mean loss over all n_k examples of client k, and Step one step of `optimizer`: any
    of torch.optim that needs only gradients, and takes tensors of every shape. With SGD,
    Step(w, g) = w - lr g, it is FedAvg with one full-batch step. McMahan et al. 2017, section 2
    (FederatedSGD).

    Buffers (BatchNorm) are averaged, frozen parameters stay. `train.optimizer`, batches and
    epochs have no effect. What the optimizer remembers, `memory`, is kept for resume by
    "<parameter>/<name in torch>". The step holds model, gradient and memory.
    """

    def __init__(
        self, *args: Any, task: Task | None, optimizer: Mapping[str, Any], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if task is None:
            raise ConfigError("strategy=fedsgd needs the task")
        optim.check_optimizer(optimizer, _KEY)
        _refuse_unfit(optimizer)
        self.memory = ArrayRecord()
        model = task.model()
        self._spec, self._trained = dict(optimizer), trained(model).keys()
        self._buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        config["answer"] = "gradient"
        return super().configure_train(server_round, arrays, config, grid)

    def combine(self, server_round: int, updates: list[ClientUpdate]) -> StoredArrays:
        mean = Mean(specs_of(self.model).values())
        for update in updates:
            mean.add(update.arrays.weights, update.examples)
        state = to_torch(self.model)
        parameters: dict[str, torch.nn.Parameter] = {}
        for name in state:
            value = to_torch(from_numpy({name: mean.pop(name)}))[name]
            if name in self._trained:
                parameters[name] = torch.nn.Parameter(state[name])
                parameters[name].grad = value
            elif name in self._buffers:
                state[name] = value
        optimizer = optim.optimizer(parameters.values(), self._spec, _KEY)
        for key, value in to_torch(self.memory).items():
            name, _, item = key.rpartition("/")
            optimizer.state[parameters[name]][item] = value
        optimizer.step()  # in the memory of `state`
        for name, parameter in parameters.items():
            if not parameter.isfinite().all():
                raise Diverged(
                    f"the step of {_KEY} makes tensor {name!r} NaN or infinite, though every "
                    f"gradient is finite; lower {_KEY}.lr"
                )
        self.memory = from_torch(
            {
                f"{name}/{item}": value
                for name, parameter in parameters.items()
                for item, value in optimizer.state[parameter].items()
                if isinstance(value, torch.Tensor)
            }
        )
        return store_arrays(self.model.vault, from_torch(state))


def _refuse_unfit(optimizer: Mapping[str, Any]) -> None:
    """ConfigError for an optimizer that could not make the server's step."""
    if str(optimizer["name"]).lower() == "muon":
        raise ConfigError(
            f"{_KEY}.name=Muon cannot be used with strategy=fedsgd: it takes matrices only, and "
            "the server steps all parameters, biases too; choose SGD or AdamW"
        )
    for option, why in (
        ("differentiable", "the step itself is not differentiated, and torch refuses it"),
        ("capturable", "the server steps on the CPU, which torch does not capture"),
    ):
        if optimizer.get(option):
            raise ConfigError(
                f"{_KEY}.{option}=true cannot be used with strategy=fedsgd: {why}; "
                f"drop it with ~{_KEY}.{option}"
            )
