"""A client that keeps its records private: it pays from its own ledger before it touches them.

What the coordinator asks for is in the run's configuration, section `privacy`; what the site
allows is in its ledger, and in its node's configuration:

- `ledger`: the folder with the site's ledgers; else fedipfs.privacy.ledger.default_folder();
- `simulated`: true for a client that the coordinator's own machine plays. Only such a one makes
  noise that can be repeated, makes its own ledger (with the cap `ledger-epsilon`, `ledger-delta`),
  and trains without privacy although its data have a ledger.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from flwr.app import ConfigRecord, Context

from fedipfs.clients.trainer import Private
from fedipfs.data import Examples
from fedipfs.errors import (
    BudgetSpent,
    ConfigError,
    LedgerError,
    PrivacyRequired,
    UnsupportedModel,
    Withheld,
)
from fedipfs.privacy import noise
from fedipfs.privacy.base import HOOKS, Mechanism
from fedipfs.privacy.metrics import noisy_means
from fedipfs.tasks import Task
from fedipfs.tasks.evaluation import evaluate_each

if TYPE_CHECKING:
    from fedipfs.privacy.accounting import Event
    from fedipfs.privacy.ledger import Ledger

log = logging.getLogger(__name__)

RECORD = "privacy"  # the key of what an answer says of its own privacy
LEVEL = "dp_sgd"
_BOUNDS = (1e-9, 1e9)  # of norms and values
_NOISE = (1e-2, 1e6)
_MOST = 10_000_000  # examples


class Asked(NamedTuple):
    """By whom, in which round of which run: for the ledger."""

    run: str
    round: int
    coordinator: str


class Guard:
    """What one message costs the data of this site, and the noise for the answer.

    `config` is the run's, `data_set` the fingerprint of all that the client holds. Raises
    LedgerError where the site has no ledger for it, with a text that does not tell what it is.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        data_set: str,
        context: Context,
        asked: Asked,
        kind: str,
    ) -> None:
        from fedipfs.privacy.accounting import Event  # it takes Opacus along

        self._event = Event
        self._config, self._options = config, config["privacy"]
        _check(self._options)
        self._asked = asked
        node = context.node_config
        self._simulated = bool(node.get("simulated"))
        key = None
        if self._options["reproducible"]:
            if not self._simulated:
                raise ConfigError(
                    "privacy.reproducible=true makes noise that the coordinator can take off; a "
                    "site does not answer with such noise: leave it out"
                )
            place = f"{config['seed']}/{node['partition-id']}/{kind}/{asked.round}"
            key = hashlib.sha256(f"fedipfs/noise/{place}".encode()).digest()[: noise.KEY_BYTES]
        self._source = noise.generator(key)
        self._noise = noise.SECRET if key is None else noise.KNOWN
        self._ledger = _open_ledger(node, data_set, self._options)
        self._paid: list[float] = []
        self._head = self._mode = ""

    def training(
        self, task: Task, model: torch.nn.Module, examples: Examples, *, whole: bool = False
    ) -> Private:
        """Pay for a round of training, or with `whole` for one step's gradient.

        Raises BudgetSpent, and UnsupportedModel before anything is paid.
        """
        from fedipfs.privacy import plan

        options = self._options
        self._mode = _mode(task, model, examples, options["clipping"], telling=self._simulated)
        steps = plan.work(
            self._config["train"],
            examples=options["examples"],
            sample_rate=options["sample_rate"],
            whole=whole,
        ).steps
        event = self._event(options["noise_multiplier"], options["sample_rate"], steps)
        self._pay(event, "gradient" if whole else "training")
        rate, known = options["sample_rate"], options["examples"]
        step = Mechanism(options["noise_multiplier"], options["clip_norm"], rate, rate * known)
        batch = options["physical_batch"]
        return Private(step, steps, known, self._source, self._mode, batch)

    def measure(
        self, task: Task, model: torch.nn.Module, examples: Examples, known: float
    ) -> dict[str, float]:
        """Loss and metrics of `model` on `examples`, noised and paid for.

        `known` is the number of examples as everybody may know it. Raises PrivacyRequired where
        metrics are to be withheld, and BudgetSpent.
        """
        options = self._options
        if options["metrics"] != "noise":
            raise PrivacyRequired(
                "what a model achieves on this client's examples is withheld: set "
                "privacy.metrics=noise, or do not ask (evaluate.federated=false)"
            )
        multiplier = options["metrics_noise_multiplier"]
        self._pay(self._event(multiplier, 1.0, 1), "metrics")
        inputs, targets = examples.inputs, examples.targets
        if not len(examples):  # that nobody shall see: the same names as everybody's, by a blank
            inputs = np.zeros((1, *inputs.shape[1:]), inputs.dtype)
            targets = np.zeros((1, *targets.shape[1:]), targets.dtype)
        values = evaluate_each(
            task,
            model,
            inputs,
            targets,
            batch_size=self._config["evaluate"]["batch_size"],
            device=self._config["train"]["device"],
        )
        values = {name: each[: len(examples)] for name, each in values.items()}
        return noisy_means(
            values,
            bounds=options["metric_bounds"],
            examples=known,
            noise_multiplier=multiplier,
            source=self._source,
        )

    def loss(self, task: Task, model: torch.nn.Module, examples: Examples) -> float:
        """The mean loss of `model` on the training examples, noised and paid for."""
        return self.measure(task, model, examples, self._options["examples"])["loss"]

    @contextmanager
    def discreet(self) -> Iterator[None]:
        """Around what touches records: what goes wrong there is told to the site's own log alone.

        The text of an error may hold a label, or be there for one record only. Simulated clients
        tell it, as their data are the coordinator's.
        """
        try:
            yield
        except (BudgetSpent, LedgerError, PrivacyRequired, UnsupportedModel):
            raise
        except Exception:
            if self._simulated:
                raise
            log.exception("round %d of %s", self._asked.round, self._asked.run)
            raise Withheld(
                "this client could not answer, and why may tell of its records; its own log says "
                "why"
            ) from None

    def record(self) -> ConfigRecord:
        """What the answer says: each event that was paid for (noise multiplier, sampling rate,
        steps, one after another), the ledger's head, how gradients were clipped, whose noise."""
        return ConfigRecord(
            {
                "events": self._paid,
                "ledger": self._head,
                "clipping": self._mode,
                "noise": self._noise,
            }
        )

    def _pay(self, event: Any, purpose: str) -> None:
        with _discreet():
            receipt = self._ledger.spend(
                [event],
                purpose=purpose,
                **self._asked._asdict(),
            )
        self._head = receipt.head
        self._paid += [float(value) for value in event]


def require_none(
    context: Context,
    data_set: Callable[[], str],
    part: Event | None = None,
    asked: Asked | None = None,
) -> None:
    """PrivacyRequired where the site keeps ledgers: what its records may spend is to be counted.

    Also if none of them is for these records, which may be a new version of others: unless the
    node's configuration says `public-data`. If only a `part` in a noised sum is `asked` for, that
    is paid. Raises BudgetSpent.
    """
    if context.node_config.get("simulated") or context.node_config.get("public-data"):
        return
    from fedipfs.privacy import ledger

    folder = str(context.node_config.get("ledger") or ledger.default_folder())
    with _discreet():
        if not ledger.ledgers(folder):
            return
        if part is not None and asked is not None:
            found = ledger.Ledger.open(folder, data_set())
            found.spend([part], purpose="a part in a noised sum", **asked._asdict())
            return
    raise PrivacyRequired(
        "this site keeps count of what its records spend in privacy, and what was asked does not; "
        "run with privacy=dp_sgd, or privacy=distributed and secagg=on"
    )


@contextmanager
def _discreet() -> Iterator[None]:
    """Keep for the site's own log what is wrong with a ledger: files are named after the data."""
    try:
        yield
    except LedgerError as error:
        log.error("%s", error)
        raise LedgerError(
            f"the site's privacy ledger cannot be used ({type(error).__name__}); its own log says "
            "why"
        ) from error


def _check(options: Mapping[str, Any]) -> None:
    """ConfigError for numbers that no honest run has; the coordinator's own check does not count.

    Where noise is next to nothing, or its numbers are so large or small that floating point has
    none in proportion, what is paid for would not be what is done.
    """
    bounds = options["metric_bounds"]
    ranges = [("clip_norm", options["clip_norm"], *_BOUNDS)]
    ranges += [("metric_bounds", bound, *_BOUNDS) for bound in dict(bounds).values()]
    ranges += [
        ("noise_multiplier", options["noise_multiplier"], *_NOISE),
        ("metrics_noise_multiplier", options["metrics_noise_multiplier"], *_NOISE),
        ("sample_rate", options["sample_rate"], 1e-9, 1.0),
        ("examples", options["examples"], 1, _MOST),
        ("physical_batch", options["physical_batch"], 1, _MOST),
    ]
    for name, value, least, most in ranges:
        if type(value) not in (int, float) or not least <= value <= most:
            raise ConfigError(
                f"privacy.{name} is {value!r:.40}: a site takes numbers from {least:g} to {most:g}"
            )


def _open_ledger(node: Mapping[str, Any], data_set: str, options: Mapping[str, Any]) -> Ledger:
    from fedipfs.privacy.ledger import default_folder, find

    folder = str(node.get("ledger") or default_folder())
    with _discreet():
        if node.get("simulated") and find(folder, data_set) is None:
            _simulated_ledger(folder, data_set, node, options["accountant"])
        return _ledger(folder, data_set)


def _simulated_ledger(folder: str, data_set: str, node: Mapping[str, Any], accountant: str) -> None:
    from fedipfs.privacy.ledger import Ledger
    from fedipfs.privacy.room import Cap

    Ledger.create(folder, data_set, Cap(node["ledger-epsilon"], node["ledger-delta"], accountant))


@lru_cache(maxsize=256)
def _ledger(folder: str, data_set: str) -> Ledger:
    """One object a ledger: it need not read again what it has seen."""
    from fedipfs.privacy.ledger import Ledger

    return Ledger.open(folder, data_set)


_modes: WeakKeyDictionary[torch.nn.Module, dict[str, str]] = WeakKeyDictionary()


def _mode(
    task: Task, model: torch.nn.Module, examples: Examples, wanted: str, *, telling: bool
) -> str:
    """How gradients of `model` are clipped; found out once a module."""
    from fedipfs.privacy.models import fitting_mode

    if not len(examples):
        return HOOKS  # none of them will need it
    known = _modes.setdefault(model, {})
    if wanted not in known:
        mode = None if wanted == "auto" else wanted
        known[wanted] = fitting_mode(
            task, model, examples.inputs, examples.targets, mode=mode, telling=telling
        )
    return known[wanted]
