"""Every exception FedIPFS raises on purpose.

    FedIPFSError                      has `exit_code`, the process's answer when nobody catches it
    ├── UserError                     2: the user's to fix
    │   ├── ConfigError               a configuration value, or a combination of them
    │   │   └── UnsupportedModel      a model that DP-SGD cannot train privately; names the layers
    │   ├── DataError                 data files: missing, malformed, wrong checksum
    │   ├── RunError                  a run's folder: exists, not found, in use, finished
    │   ├── StoreError                the block store
    │   │   ├── StoreUnusable         no permission, read-only, not a store, or credentials refused
    │   │   ├── StoreUnreachable      the service behind the store does not answer
    │   │   ├── StoreTimeout          it did not answer in time
    │   │   ├── StoreBadAnswer        it answered what no honest service answers
    │   │   ├── StoreFull             no space left, or over the configured cap
    │   │   ├── BlockNotFound         a CID the store does not hold
    │   │   └── BlockCorrupt          bytes that do not hash to their CID
    │   ├── KeyFileError              a file of private keys: unreadable, open to others, damaged
    │   ├── TrustListError            a trust list: unreadable, malformed, contradictory
    │   ├── JoinError                 a join or federation file, or members.json: not one, damaged
    │   ├── ActivityError             a site's activity log or replay positions: unusable
    │   │   └── ActivityTampered      a line of the log was changed, moved or taken out
    │   ├── NodeUnusable              a site's process: what it needs is wrong, or it is refused
    │   ├── JournalError              a secure-aggregation journal: unreadable, altered, not ours
    │   └── LedgerError               a privacy ledger: missing, unreadable, in use, or altered
    │       └── LedgerTampered        its chain is broken, or its end is missing
    ├── FormatError (ValueError)      2: bytes or text that do not follow their specification
    │   ├── CidError
    │   ├── UnixFSError
    │   ├── DagCborError
    │   ├── CarError
    │   ├── WeightsError              safetensors bytes
    │   ├── CompressionError          an update that cannot be compressed as asked
    │   │   ├── BadPayload            a compressed update that is malformed, or not as asked
    │   │   └── WrongBase             a compressed update to another model than was sent
    │   ├── BadMessage                a message of secure aggregation that is malformed
    │   └── EnvelopeError             sealed bytes that cannot be opened
    │       ├── EnvelopeVersion       sealed in a form that this version does not know
    │       ├── EnvelopeTampered      changed, reordered or spliced since it was sealed
    │       ├── EnvelopeTruncated     its end is missing
    │       ├── NotSealed             plain bytes where sealed ones are required
    │       └── NotRecipient          sealed to others
    ├── SignatureRefused              3: what arrived is not signed as it must be
    │   ├── SignatureMissing
    │   ├── SignatureWrong            the signature does not fit what was signed
    │   ├── SignerUnknown             nobody in the trust list, or not in that role
    │   ├── SignerExpired             outside the dates of the trust list
    │   ├── SignerRevoked
    │   └── Replayed                  a message that came before, or after what came later
    ├── PolicyRefused                 3: what a site's policy forbids; names the rule
    ├── JoinRefused                   3: a join or federation file that is not to be believed
    ├── SecAggRefused                 3: what no honest party to secure aggregation asks or says
    │   ├── BelowFloor                parameters weaker than a site permits, or not those it pinned
    │   ├── WrongSession              a session that does not fit what a client is asked to do
    │   ├── NotInCohort               from, or to, somebody whom the session does not name
    │   ├── WrongKeys                 swapped, copied or worthless keys
    │   ├── WrongShare                a share that does not open, or was not asked for
    │   ├── WrongVector               a masked vector in another's place, or of another shape
    │   ├── SurvivorsDiffer           not the survivors that this party, or another, has seen
    │   ├── BothShares                asked for both shares of one peer
    │   ├── SecondAnswer              a second answer that would differ from the first
    │   ├── OutOfTurn                 a stage before the one that it builds on
    │   └── TooLate                   after its stage, or its round, was closed
    ├── SecAggFailed                  3: too few are left to unmask a sum, or shares are wrong
    ├── EdgeError                     1: a message that would carry more than CIDs through Flower
    ├── BudgetSpent                   3: a round would pass what a site's privacy ledger allows
    ├── PrivacyRequired               3: a site was asked for what it gives away only with privacy
    ├── Withheld                      3: a client failed, and why may tell of its records
    ├── ParallelFailed                3: of a site's processes that train together one failed, ...
    ├── BadUpdate                     3: one client's update cannot be used; names client and reason
    ├── RunFailed                     3: too few clients succeeded, ...
    │   └── Diverged                  the loss or the weights left all bounds
    ├── NodeFailed                    3: a site's process does not stay up
    └── RunInterrupted                130: stopped by the user; resumable

Messages are one line: what, where, what to do.
"""

from __future__ import annotations


def one_line(problem: object, limit: int = 500) -> str:
    """`problem` as text that fits a line, a record and a terminal, whoever wrote it."""
    text = " ".join(str(problem).split()).encode("utf-8", "replace").decode()
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class FedIPFSError(Exception):
    """Base of all deliberate errors; `exit_code` is what a command returns for it."""

    exit_code = 1


class UserError(FedIPFSError):
    """Something the user can fix."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration value, or a combination of values, that cannot be right."""


class UnsupportedModel(ConfigError):
    """A model, or a loss, that DP-SGD cannot train privately."""


class DataError(UserError):
    """Data files that are missing, malformed or fail their checksum."""


class RunError(UserError):
    """A run's folder exists already, is not found, is in use or is finished."""


class StoreError(UserError):
    """The block store cannot do what was asked."""


class StoreUnusable(StoreError):
    """The store cannot be opened or written."""


class StoreUnreachable(StoreError):
    """The service behind a store does not answer: refused, reset, or no such host."""


class StoreTimeout(StoreError):
    """The service behind a store did not answer in time."""


class StoreBadAnswer(StoreError):
    """The service behind a store answered what no honest one does: too much, garbage, ..."""


class StoreFull(StoreError):
    """No space is left on the device, or the store has reached its cap."""


class BlockNotFound(StoreError):
    """The store does not hold a block."""


class BlockCorrupt(StoreError):
    """A block's bytes do not hash to its CID."""


class KeyFileError(UserError):
    """A file of private keys that is unreadable, damaged, or open to other users."""


class TrustListError(UserError):
    """A trust list that is unreadable, malformed or contradicts itself."""


class JoinError(UserError):
    """A join file, a federation file or a list of members that is none, or is damaged."""


class ActivityError(UserError):
    """A site's own account, of what it did or of what it was asked, that cannot be used."""


class ActivityTampered(ActivityError):
    """An activity log in which a line was changed, moved or taken out."""


class NodeUnusable(UserError):
    """A site's process that cannot work before a person puts something right.

    Its data or keys are not right, or its SuperNode is refused by the SuperLink, or refuses it.
    """


class JournalError(UserError):
    """A journal of secure aggregation that is unreadable, altered, or open to other users."""


class LedgerError(UserError):
    """A privacy ledger that is missing, unreadable, in use, or does not fit the data set."""


class LedgerTampered(LedgerError):
    """A privacy ledger whose chain is broken or whose end is missing."""


class FormatError(FedIPFSError, ValueError):
    """Bytes or text that do not follow their specification."""

    exit_code = 2


class CidError(FormatError):
    """Not a CID, or one with a hash or version that is not supported."""


class UnixFSError(FormatError):
    """Not a UnixFS file DAG, or one whose sizes or shape do not add up."""


class DagCborError(FormatError):
    """Not canonical DAG-CBOR, or a value that DAG-CBOR cannot hold."""


class CarError(FormatError):
    """Not a CARv1 stream."""


class WeightsError(FormatError):
    """Not a safetensors file, or tensors that do not fit what was asked."""


class CompressionError(FormatError):
    """An update or model that cannot be compressed as asked."""


class BadPayload(CompressionError):
    """A compressed update that is malformed, or not as it was asked for."""


class WrongBase(CompressionError):
    """A compressed update that is relative to another model than the one that was sent."""


class BadMessage(FormatError):
    """A message of secure aggregation that is malformed."""


class EnvelopeError(FormatError):
    """Sealed bytes that cannot be opened."""


class EnvelopeVersion(EnvelopeError):
    """Sealed in a form that this version does not know."""


class EnvelopeTampered(EnvelopeError):
    """Changed, reordered or spliced since it was sealed."""


class EnvelopeTruncated(EnvelopeError):
    """The end is missing."""


class NotSealed(EnvelopeError):
    """Plain bytes where sealed ones are required."""


class NotRecipient(EnvelopeError):
    """Sealed to others."""


class SignatureRefused(FedIPFSError):
    """What arrived is not signed as it must be."""

    exit_code = 3


class SignatureMissing(SignatureRefused):
    """There is no signature where one is required."""


class SignatureWrong(SignatureRefused):
    """The signature does not fit what was signed, or by whom."""


class SignerUnknown(SignatureRefused):
    """The signer is not in the trust list, or not in that role."""


class SignerExpired(SignatureRefused):
    """Now is outside the signer's dates in the trust list."""


class SignerRevoked(SignatureRefused):
    """The signer's key is revoked in the trust list."""


class Replayed(SignatureRefused):
    """A message that came before, or that is of a round before one that has begun."""


class PolicyRefused(FedIPFSError):
    """What a site's policy forbids. The text begins with the rule's name in site.yaml."""

    exit_code = 3


class JoinRefused(FedIPFSError):
    """A join or federation file that is not to be believed: too old, or of other keys than known.

    One that is not signed as it must be is a SignatureRefused.
    """

    exit_code = 3


class SecAggRefused(FedIPFSError):
    """What an honest party to secure aggregation never asks or says."""

    exit_code = 3


class BelowFloor(SecAggRefused):
    """Parameters that are weaker than a site permits, or not the ones that it has pinned."""


class WrongSession(SecAggRefused):
    """A session of another run, round or model than what a client is asked to do."""


class NotInCohort(SecAggRefused):
    """Somebody whom the session does not name."""


class WrongKeys(SecAggRefused):
    """Keys that are swapped, copied, of small order, or not the ones that were sent."""


class WrongShare(SecAggRefused):
    """A share that does not open, is missing, or was not asked for."""


class WrongVector(SecAggRefused):
    """A masked vector in the place of another, or of the wrong shape or type."""


class SurvivorsDiffer(SecAggRefused):
    """Survivors that are not those which this party, or another one, has seen."""


class BothShares(SecAggRefused):
    """Asked for a share of both secrets of one peer, which together would unmask it."""


class SecondAnswer(SecAggRefused):
    """A second answer that would differ from the first."""


class OutOfTurn(SecAggRefused):
    """A stage that comes before the one it builds on."""


class TooLate(SecAggRefused):
    """A message after its stage, or its round, was closed."""


class SecAggFailed(FedIPFSError):
    """A secure aggregation cannot give a sum: too few are left, or shares are wrong."""

    exit_code = 3


class EdgeError(FedIPFSError):
    """A message that would carry more than CIDs and small scalars through Flower."""


class BudgetSpent(FedIPFSError):
    """What was asked would pass the privacy budget that a site has set for its data."""

    exit_code = 3


class PrivacyRequired(FedIPFSError):
    """A site was asked for something that it gives away only with differential privacy."""

    exit_code = 3


class Withheld(FedIPFSError):
    """A client failed where it works on its records, and only its own log says why."""

    exit_code = 3


class ParallelFailed(FedIPFSError):
    """Processes that train together at a site: one failed or died, or they took too long."""

    exit_code = 3


class BadUpdate(FedIPFSError):
    """One client's update cannot be used."""

    exit_code = 3


class RunFailed(FedIPFSError):
    """The run cannot go on: too few clients succeeded, or training diverged."""

    exit_code = 3


class Diverged(RunFailed):
    """The loss or the weights are not finite, or far beyond where they began."""


class NodeFailed(FedIPFSError):
    """A process of a site that does not stay up."""

    exit_code = 3


class RunInterrupted(FedIPFSError):
    """The user stopped the run; it can be resumed."""

    exit_code = 130
