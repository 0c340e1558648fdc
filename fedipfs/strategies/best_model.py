"""One client's model becomes the global one."""

from __future__ import annotations

from fedipfs.errors import RunFailed
from fedipfs.exchange import StoredArrays, check_update, specs_of
from fedipfs.strategies.base import ClientUpdate
from fedipfs.strategies.selecting import SelectingStrategy


class BestModel(SelectingStrategy):
    """w_{t+1} = w_k for k = argmax_k s_k (argmin, by `direction`), over the answers of round t.

    s_k is the score of w_k under `selector`: what its author reports, what it achieves on the
    coordinator's examples, or the median of what other clients measure. Ties go to the lower node
    id. The whole ranking is in `notes`. An update without a score can not win; if no update has
    one, the round fails with the reasons.
    """

    def combine(self, server_round: int, updates: list[ClientUpdate]) -> StoredArrays:
        by_node = {update.node: update for update in updates}
        ranking = self._rank(updates)
        best = ranking[0]
        if best.value is None:
            raise RunFailed(
                f"round {server_round}: no update has a score (node {best.node}: {best.reason}); "
                "mend the evaluation, or choose another strategy.selector"
            )
        chosen = by_node[best.node].arrays
        check_update(chosen, specs_of(self.model), read=True)
        self._notes = {"ranking": [score.note() for score in ranking]}
        return self._readable(best.node, chosen)
