"""One round without clients: updates are put into the store and answered by CID."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from grids import DirectGrid

from fedipfs import CidGrid, FolderStore, use_store
from fedipfs.exchange import Exchange, StoredArrays, from_numpy, specs_of, store_arrays

Tensors = Mapping[str, np.ndarray]


class OneRound:
    """Nodes from 2 on answer `updates`, in that order, with `examples` each."""

    def __init__(
        self,
        store: FolderStore,
        model: Tensors | StoredArrays,
        updates: list[Tensors],
        examples: list[float] | None = None,
    ) -> None:
        use_store(store)
        self.store, self.updates = store, updates
        self.examples = examples or [10] * len(updates)
        self.model = store_arrays(
            store, model if isinstance(model, StoredArrays) else from_numpy(model)
        )

    def grid(self, *, read: bool) -> CidGrid:
        grid = DirectGrid(lambda message, context: self._answer(message), len(self.updates))
        return CidGrid(grid, self.store, read_updates=read)

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id - 2
        metrics = MetricRecord({"num-examples": self.examples[node], "train_loss": float(node)})
        content = RecordDict({"arrays": from_numpy(self.updates[node]), "metrics": metrics})
        return Message(Exchange(self.store).swap_out(content), reply_to=message)

    def replies(self, strategy, number: int = 1) -> list[Message]:
        read = not getattr(strategy, "screens_replies", False)
        grid = self.grid(read=read)
        messages = strategy.configure_train(number, self.model, ConfigRecord(), grid)
        return list(grid.send_and_receive(messages))

    def play(self, strategy, number: int = 1) -> StoredArrays:
        """The model that `strategy` makes of the updates, stored in the model's dtypes."""
        arrays, self.metrics = strategy.aggregate_train(number, self.replies(strategy, number))
        return store_arrays(self.store, arrays, specs_of(self.model))


def values(arrays: StoredArrays) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in arrays.items()}
