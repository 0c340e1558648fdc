"""SCAFFOLD at the client: the control variate that it keeps, and what it answers.

Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
Algorithm 1 with option II. A client's new control variate counts once the server has taken it
up: until a message says so the client keeps both, so that an update that is lost or left out
does not part the server's control variate from the mean of the clients'.
"""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedipfs.exchange import from_torch, to_torch
from fedipfs.tasks.names import trained

_OWN, _NEW, _ROUND = "control", "control-new", "control-round"  # records in the client's state


class Control:
    """The control variates of one message: c, which came with it, and c_i, which is kept here.

    `model` is as it came in. `taken` is the last round whose answer the server took up.
    """

    def __init__(
        self, model: torch.nn.Module, came: ArrayRecord, state: RecordDict, *, taken: int
    ) -> None:
        self._model, self._state = model, state
        self._start = {name: each.detach().clone() for name, each in trained(model).items()}
        self._common = to_torch(came)
        _settle(state, taken)
        kept = state.get(_OWN)
        zeros = {name: torch.zeros_like(each) for name, each in self._start.items()}
        self._own = to_torch(kept) if isinstance(kept, ArrayRecord) else zeros

    @property
    def correction(self) -> dict[str, Tensor]:
        """c - c_i, which is added to every gradient."""
        return {name: self._common[name] - self._own[name] for name in self._start}

    def answer(self, *, steps: int, learning_rate: float, server_round: int) -> ArrayRecord:
        """c + (c_i+ - c_i), after the model was trained; c_i+ waits in the state.

        Option II, c_i+ = c_i - c + (x - y_i) / (K eta), makes that (x - y_i) / (K eta): the
        client's mean gradient. c_i+ is computed from it as the server computes c, in float64, so
        that with one client both stay the same to the bit.
        """
        mean, new = {}, {}
        for name, end in trained(self._model).items():
            start, common, own = self._start[name], self._common[name], self._own[name]
            moved = start.double() - end.detach().double()
            mean[name] = (moved / (steps * learning_rate)).to(start.dtype)
            new[name] = (own.double() - common.double() + mean[name].double()).to(start.dtype)
        self._state[_NEW] = from_torch(new)
        self._state[_ROUND] = ConfigRecord({"round": server_round})
        return from_torch(mean)


def _settle(state: RecordDict, taken: int) -> None:
    """Make what was answered in round `taken` the client's own; forget what was not taken up."""
    asked = state.pop(_ROUND, None)
    new = state.pop(_NEW, None)
    if isinstance(asked, ConfigRecord) and new is not None and asked["round"] == taken:
        state.pop(_OWN, None)  # Flower warns where one of another type is replaced
        state[_OWN] = new
