"""The gate of a site: what comes in has to pass its policy, and what was done is written down.

`gate_mod` is the outermost mod of the ClientApp, around `cid_mod`. Before anything that a message
names is fetched, but for the head of its model's file and the run's configuration, it

1. checks that a coordinator whom the site accepts has signed it for this node;
2. refuses it if it came before (replay.py), and notes it if it did not, whatever follows;
3. applies the policy (policy.py);

and before it trains, and after the answer or the refusal, it adds a line to the activity log
(activity.py). If that cannot be written, nothing is answered: nobody gets the CID of what was made,
although its blocks may be in the store by then, sealed. So every message that is signed for this
site is worked on once at most, every training is in the log even if it ends the worker, and so is
every answer that leaves.

What a message asks for follows from its type: `train` and `train.secagg` train; `query.secagg` of
the stage `advertise` begins to, and of others goes on; `evaluate`, `query.capabilities` (an offer)
and `query.prefetch` (a model to fetch) say so. Others are refused. The rules for each are in
policy.py; what they look at comes from

- the run's configuration, whose CID the message holds: the task, and the level of privacy;
- the record "config": how many are asked, or, under secure aggregation, its session, which all of
  the cohort sign. A coordinator that sums in the open can lie about it;
- the head of the files of models that come, which says how many parameters they have;
- the site's own data, as the run's configuration has them split.

Without a gate (`use_gate`), as for the clients of a run on one machine, everything passes.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedipfs.clients.activity import Activity, Value
from fedipfs.clients.policy import Asked, Policy, Work
from fedipfs.clients.replay import Positions
from fedipfs.errors import (
    ActivityError,
    BadMessage,
    BadUpdate,
    FedIPFSError,
    PolicyRefused,
    SignatureMissing,
    SignatureWrong,
    Withheld,
    one_line,
)
from fedipfs.exchange import (
    Stamp,
    StoredArrays,
    Vault,
    default_vault,
    get_ensemble,
    signing,
    stages,
)
from fedipfs.exchange.heart import check_small
from fedipfs.exchange.mod import PREFETCH
from fedipfs.ipld import CID, unixfs
from fedipfs.secagg import Session
from fedipfs.trust import Member, envelope

log = logging.getLogger(__name__)

CallNext = Callable[[Message, Context], Message]
Count = Callable[[str | None, Context], tuple[int, int]]
Keep = Callable[[str, str, int, RecordDict], None]

_WORK = {
    "train": Work.TRAIN,
    stages.TRAIN: Work.TRAIN,
    stages.QUERY: Work.STAGE,
    "evaluate": Work.EVALUATE,
    "query.capabilities": Work.OFFER,
    PREFETCH: Work.FETCH,
}
_ARRAYS = {  # the keys of array records that may come
    "train": {"arrays", "control"},
    stages.TRAIN: {"arrays"},
    "evaluate": {"arrays"},
    PREFETCH: {"arrays"},
}
_EVENT = {Work.TRAIN: "trained", Work.EVALUATE: "evaluated", Work.FETCH: "prefetched"}
_BEGAN = "began"
_FIRST = "advertise"  # the stage with which secure aggregation begins
_PRIVATE, _PRIVATE_IN_SUMS = "dp_sgd", "distributed"
_chosen: list[Gate] = []


def use_gate(gate: Gate | None) -> None:
    """Have messages to this process pass `gate`; None: all pass."""
    _chosen[:] = [] if gate is None else [gate]


def gate_in_use() -> Gate | None:
    """What was given to `use_gate`."""
    return _chosen[0] if _chosen else None


def gate_mod(message: Message, context: Context, call_next: CallNext) -> Message:
    """Use as the first (outermost) mod, before `cid_mod`."""
    gate = gate_in_use()
    return call_next(message, context) if gate is None else gate.answer(message, context, call_next)


def _local() -> datetime:
    return datetime.now().astimezone()


class _Terms(NamedTuple):
    """What counts of a run's configuration; `reach`: how many examples its steps can see."""

    task: str
    privacy: str
    reach: int | None


class Gate:
    """Lets through what `policy` allows, once, and notes it in `activity`.

    `examples` gives how many examples a run trains on here and how many it holds out, by the CID
    of its configuration; where that is not known, None, how many there are. `keep` takes what a
    message to train leaves in the context's state, with its coordinator, run and round, before
    the answer is noted; `now` is the local time, aware.
    """

    def __init__(
        self,
        policy: Policy,
        activity: Activity,
        positions: Positions,
        *,
        examples: Count,
        keep: Keep = lambda by, run, number, state: None,
        now: Callable[[], datetime] = _local,
    ) -> None:
        self.policy = policy
        self._activity, self._positions = activity, positions
        self._examples, self._keep, self._now = examples, keep, now
        self._problems = 0  # that were noted
        self._terms: tuple[str, _Terms] | None = None  # of the run that was asked for last
        # Of a process that was here before: to begin it anew gives no further rounds.
        trained = [entry.time for entry in activity.recent() if entry.event == _BEGAN]
        self._trained: deque[datetime] = deque(trained, maxlen=policy.rounds_per_hour or 1)

    def answer(self, message: Message, context: Context, call_next: CallNext) -> Message:
        """What the app answers; raises what it raises, PolicyRefused, or a SignatureRefused."""
        began, told = time.monotonic(), dict[str, Value]()
        kind = message.metadata.message_type
        try:
            work, stamp = self._admit(message, context, told)
            reply = call_next(message, context)
            if reply.has_error():
                told["reason"] = reply.error.reason
                self._note("failed", kind=kind, **told)
                return reply
            if work is Work.TRAIN:
                self._keep(str(told["coordinator"]), stamp.run, stamp.round, context.state)
        except Exception as problem:
            self._note_problem(problem, {"kind": kind, **told})
            raise
        told["seconds"] = round(time.monotonic() - began, 1)
        told |= _answered(reply.content)
        self._note(_EVENT.get(work, "answered"), kind=kind, **told)
        return reply

    @contextmanager
    def noting(self) -> Iterator[dict[str, Value]]:
        """Note also what fails around `answer`: what cannot be read, or is of no known type.

        What is known of the message goes into what this gives.
        """
        told, before = dict[str, Value](), self._problems
        try:
            yield told
        except Exception as problem:
            if self._problems == before:
                self._note_problem(problem, told)
            raise

    def _admit(
        self, message: Message, context: Context, told: dict[str, Value]
    ) -> tuple[Work, Stamp]:
        """What is asked for, if that is permitted; what is known of it is put into `told`."""
        content, kind = message.content, message.metadata.message_type
        check_small(content)
        vault = default_vault("participant")
        if vault.party is None:
            raise SignatureMissing(
                "this site answers signed messages only, and has no keys by which to check them"
            )
        stamp = signing.stamp_of(content)
        expected = stamp and stamp._replace(to=signing.address(message, context.node_id))
        member = signing.check(vault, content, expected)
        assert stamp is not None
        by, attempt = member.identity.organization, signing.attempt_of(content)
        told |= {"coordinator": by, "run": stamp.run, "round": stamp.round}
        told["attempt"] = attempt or None
        _check_round(content, stamp)
        self.policy.check_coordinator(by)
        if kind not in _WORK:
            raise PolicyRefused(f"policy: {one_line(kind, 40)} is nothing that this site is for")
        with _discreet():
            self._positions.take(by, stamp, attempt)
        begun = {"kind": kind, **told}
        asked = self._asked(_WORK[kind], vault, message, context, member, told)
        self.policy.check(asked)
        if asked.work is Work.TRAIN:
            self._note(_BEGAN, **begun)
            self._trained.append(asked.now)
        return asked.work, stamp

    def _asked(
        self,
        work: Work,
        vault: Vault,
        message: Message,
        context: Context,
        member: Member,
        told: dict[str, Value],
    ) -> Asked:
        ask = message.content.get("config")
        ask = ask if isinstance(ask, ConfigRecord) else ConfigRecord()
        masked = message.metadata.message_type in (stages.TRAIN, stages.QUERY)
        if work is Work.STAGE:
            told["stage"] = one_line(ask.get(stages.STAGE), 40)
            if ask.get(stages.STAGE) == _FIRST:
                work = Work.BEGIN
        terms = None
        if (named := ask.get("run-config")) is not None:
            terms = self._terms_of(vault, named)
            told["task"] = terms.task
        learns = work in (Work.TRAIN, Work.BEGIN)
        cohort = ask.get("cohort")
        if masked and learns:
            session = Session.from_bytes(stages.get_message(vault, ask.get(stages.SESSION)))
            cohort = len(session.cohort)
        told["cohort"] = cohort if type(cohort) is int else None
        told["masked"] = masked or None
        levels = (_PRIVATE, _PRIVATE_IN_SUMS) if masked else (_PRIVATE,)
        parameters = self._parameters(vault, message, ask, member, told)
        examples = held_out = 0
        measures = work is Work.EVALUATE or (learns and bool(ask.get("report")))
        if learns or measures:
            if terms is not None:
                self.policy.check_task(terms.task)  # before anything follows from it
            named = None if terms is None else str(ask["run-config"])
            examples, held_out = self._examples(named, context)
            told["examples"] = examples if work is Work.TRAIN else None
            # DP-SGD draws its batches otherwise, and has its noise; a gradient is on all examples.
            if terms and terms.privacy != _PRIVATE and ask.get("answer") != "gradient":
                examples = examples if terms.reach is None else min(examples, terms.reach)
        return Asked(
            work=work,
            coordinator=member.identity.organization,
            task=terms and terms.task,
            parameters=parameters,
            cohort=cohort if type(cohort) is int else None,
            examples=examples,
            held_out=held_out if measures else None,
            private=terms is not None and terms.privacy in levels,
            masked=masked,
            now=self._now(),
            trained=tuple(self._trained),
        )

    def _terms_of(self, vault: Vault, named: object) -> _Terms:
        """What counts of the run's configuration with the CID `named`."""
        if self._terms is None or self._terms[0] != named:
            found = vault.get_record(CID.parse(str(named)))
            match found:
                case {"task": {"target": str(target)}, "privacy": {"name": str(level)}}:
                    self._terms = (str(named), _Terms(target, level, _reach(found.get("train"))))
                case _:
                    raise BadMessage(f"{named!s:.80} is not the configuration of a run")
        return self._terms[1]

    def _parameters(
        self,
        vault: Vault,
        message: Message,
        ask: ConfigRecord,
        member: Member,
        told: dict[str, Value],
    ) -> int:
        """Values of the model that came, or of all members of an ensemble.

        Beside a model there may be a control variate, which is no larger.
        """
        references = message.content.get(signing.KEY)
        cids = {
            field.removeprefix("cid:"): str(text)
            for field, text in (references.items() if isinstance(references, ConfigRecord) else ())
            if field.startswith("cid:")
        }
        kind = message.metadata.message_type
        for key in sorted(cids.keys() - _ARRAYS.get(kind, set())):
            raise PolicyRefused(f"policy: arrays {one_line(key, 40)!r} are nothing for {kind}")
        told["model"] = one_line(cids["arrays"], 100) if "arrays" in cids else None
        sizes = {key: self._size(vault, CID.parse(cid), member) for key, cid in cids.items()}
        if sizes.get("control", 0) > sizes.get("arrays", 0):
            raise PolicyRefused("policy: the control variate is larger than the model it is for")
        found = [*sizes.values()]
        if (ensemble := ask.get("ensemble")) is not None:
            told["model"] = one_line(ensemble, 100)
            members, _ = get_ensemble(vault, CID.parse(str(ensemble)))
            found.append(sum(self._size(vault, cid, None) for cid in members))
        return max(found, default=0)

    def _size(self, vault: Vault, cid: CID, member: Member | None) -> int:
        """Values of a model, from its root block and its head."""
        most = self.policy.max_bytes
        sealed = most + envelope.CHUNK + envelope.TAG * (most // envelope.PLAIN + 1)
        if (size := unixfs.size(cid, vault.store.get)) > sealed:
            self.policy.refuse_size(f"{size:,} bytes")
        sender = member.identity if member else None
        specs = StoredArrays.open(vault, cid, sender=sender).weights.specs
        return sum(spec.elements for spec in specs.values())

    # ---- the log

    def _note_problem(self, problem: Exception, told: dict[str, Value]) -> None:
        refused = isinstance(problem, FedIPFSError) and problem.exit_code == 3
        refused = refused and not isinstance(problem, BadUpdate | Withheld)
        rule, text = type(problem).__name__, str(problem)
        if isinstance(problem, PolicyRefused):
            rule, _, text = text.partition(": ")
        told["rule" if refused else "error"] = rule
        self._note("refused" if refused else "failed", **told, reason=text)
        self._problems += 1

    def _note(self, event: str, **told: Any) -> None:
        with _discreet():
            self._activity.note(event, **told)


@contextmanager
def _discreet() -> Iterator[None]:
    """Keep for the site's own log what is wrong with its files: it names paths."""
    try:
        yield
    except ActivityError as error:
        log.error("%s", error)
        raise ActivityError(
            "this site cannot write down what it is asked and does, so it does nothing; its own "
            "log says why"
        ) from error


def _check_round(content: RecordDict, stamp: Stamp) -> None:
    """Raise SignatureWrong for a message that is signed for another round than it says."""
    for record in content.config_records.values():
        if (said := record.get("server-round", stamp.round)) != stamp.round:
            raise SignatureWrong(
                f"the message was signed for round {stamp.round}, and says {one_line(said, 40)}"
            )


def _reach(train: object) -> int | None:
    """How many examples `train`, a section of a configuration, can see; None for all there are.

    What makes no sense there is said by those who train.
    """
    match train:
        case {"steps": int(steps), "batch_size": int(size)} if steps > 0 and size > 0:
            return steps * size
    return None


def _answered(content: RecordDict) -> dict[str, Value]:
    """The CID of what leaves: the update, or under masks what says where it is."""
    for record, field in ((signing.KEY, "cid:arrays"), (stages.RECORD, stages.ANSWER)):
        found = content.get(record)
        if isinstance(found, ConfigRecord) and isinstance(found.get(field), str):
            return {"update": str(found[field])}
    return {}
