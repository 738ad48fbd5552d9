"""The head that learns, and its versions.

A head is never changed in place: an update makes a new one (:func:`rmcore.engine.learning.online.fold`), factor and
serving weights included, and publishes it by swapping one reference. A score under way keeps the head it began with.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from rmcore._base.errors import CheckpointError, reject
from rmcore._base.numbers import COUNT, check_number
from rmcore.engine.groups import GroupScores
from rmcore.engine.learning.journal import Journal, Version, Versions
from rmcore.engine.learning.judged import JudgedPairs, judged_pairs
from rmcore.engine.learning.online import LearningConfig, UpdateReport, fold, posterior_of, with_data
from rmcore.head.checkpoint import row_posterior, row_tensors
from rmcore.head.frozen import FrozenHead
from rmcore.head.posterior import Posterior
from rmcore.ops import reference
from rmcore.ops.dispatch import Backend
from rmcore.ops.reference import TILE

__all__ = [
    "LearningConfig",
    "UpdateReport",
    "VerdictLearner",
    "beta_digest",
    "check_same_features",
    "head_identity",
    "read_version",
]

log = logging.getLogger(__name__)


class VerdictLearner:
    """Keeps a head that learns: one version an update, journalled, reversible. Use it through ``RewardEngine.update``.

    Opening a journal that has versions goes on from its current one, whichever of its versions ``head`` is: after a
    crash it is enough to load the model that was deployed and open the journal again.

    Args:
        head: the head as it is now, with its posterior.
        journal: folder of the journal (:mod:`rmcore.engine.learning.journal`); made if missing. One learner at a time
            may have it.
        config: how much a verdict may teach.
        snapshot_every: every so many versions the whole state is written, D²/2 · 8 bytes; between them a version is
            replayed from its rows. Smaller reverts faster, larger costs less disk.
        backend: of the accumulate passes.

    Raises:
        InputError: the head came without its posterior, or somebody else has the journal.
        CheckpointError: the journal is damaged, or of another head.
    """

    def __init__(
        self,
        head: FrozenHead,
        journal: str | os.PathLike[str],
        config: LearningConfig | None = None,
        *,
        snapshot_every: int = 16,
        backend: Backend = "auto",
    ) -> None:
        check_number("snapshot_every", snapshot_every, COUNT, "at least 1")
        self.config = config or LearningConfig()
        self.snapshot_every = snapshot_every
        self.backend: Backend = backend
        self._lock = threading.Lock()
        self._base = head
        self._head = head
        count = posterior_of(head).count
        if not count and math.isfinite(self.config.max_share):
            reject("head.posterior", "no data", "a fitted head", "Or set max_share=inf: a share of nothing is nothing")
        self._journal = Journal(journal)
        try:
            self._open(count)
        except BaseException:
            self._journal.close()
            raise

    @property
    def head(self) -> FrozenHead:
        """The head of the current version. It never changes; the next version is another object."""
        return self._head

    @property
    def version(self) -> int:
        """The current version's number."""
        return self._journal.current

    @property
    def versions(self) -> tuple[Version, ...]:
        """All versions so far, by number."""
        return tuple(self._journal.versions)

    @property
    def current(self) -> tuple[FrozenHead, int]:
        """The head and its version's number, which belong together."""
        with self._lock:
            return self._head, self._journal.current

    def check_head(self, head: FrozenHead) -> None:
        """Raise InputError unless ``head`` is a version of this learner's head: the same features."""
        check_same_features(head, self._head)

    def update(self, scores: GroupScores) -> UpdateReport:
        """Learn from the judged pairs of a scored batch (:func:`rmcore.engine.learning.judged.judged_pairs`).

        Raises as :meth:`learn`. No usable verdict is no error: the report says why there was none, and the version
        stays.
        """
        weights = {name: getattr(self.config, name) for name in ("judge_weight", "flip_weight", "epsilon")}
        return self.learn(judged_pairs(scores, self._head.config.mode, **weights))

    def learn(self, judged: JudgedPairs) -> UpdateReport:
        """Learn from pairs with their weights, within the bound on one update.

        The new version is on disk before it serves; if anything raises, the present one stays.

        Raises:
            InputError, NonFiniteError, FactorizationError: as :func:`fold`.
            OSError: the journal cannot be written.
        """
        with self._lock:
            if not len(judged):
                return UpdateReport(self.version, skipped=judged.skipped)
            most = self.config.max_share * self._journal.versions[0].count
            bounded, scaled = judged.bounded(most)
            head, report = fold(self._head, bounded, self.config, backend=self.backend)
            number = len(self._journal.versions)
            report = replace(report, version=number, scaled=scaled)
            tensors = {**bounded.tensors(), "beta": head.beta}
            snapshot = _snapshot(head) if number % self.snapshot_every == 0 else None
            self._journal.add(_state_digest(head), posterior_of(head).count, asdict(report), tensors, snapshot)
            self._head = head
            return report

    def revert(self, version: int) -> FrozenHead:
        """Go to any version, bit for bit, and serve it. Later versions stay in the journal and can be had again.

        Raises:
            InputError: there is no such version.
            CheckpointError: its files are damaged, or this machine's arithmetic replays it with other last bits than
                the one that wrote it; versions with a snapshot do not depend on that.
        """
        with self._lock:
            if isinstance(version, bool) or not isinstance(version, int) or not 0 <= version < len(self.versions):
                reject("version", repr(version), f"a number from 0 to {len(self.versions) - 1}")
            head = _rebuilt(self._base, self._journal, version, self.backend)
            self._journal.revert(version)
            self._head = head
            return head

    def close(self) -> None:
        """Let go of the journal. The head goes on serving; updates raise."""
        self._journal.close()

    def __enter__(self) -> VerdictLearner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, count: int) -> None:
        identity, state, journal = head_identity(self._base), _state_digest(self._base), self._journal
        if not journal.versions:
            journal.begin(identity, state, count, _snapshot(self._base))
            return
        _check_of(journal, self._base, state)
        if journal.versions[journal.current].state != state:
            self._head = _rebuilt(self._base, journal, journal.current, self.backend)
        log.info("%s: going on from version %d of %d", journal.path, journal.current, len(journal.versions) - 1)


def read_version(
    head: FrozenHead, journal: str | os.PathLike[str], version: int | None = None, *, backend: Backend = "auto"
) -> tuple[FrozenHead, int]:
    """A version of a head from the journal of a learner that goes on writing to it, and its number.

    Args:
        head: the head that the journal began with, or one it led to, with its posterior.
        journal: the folder.
        version: the number; None is the one that is current.
        backend: of the accumulate passes that replay versions without a snapshot.

    Raises:
        InputError: there is no such version, or ``head`` came without its posterior.
        CheckpointError: as :meth:`VerdictLearner.revert`; or there is no journal, or one of another head.
    """
    posterior_of(head)
    versions = Versions(journal)
    if not versions.versions:
        raise CheckpointError(f"journal: got {str(journal)!r}, in which there is no version, expected a learner's")
    _check_of(versions, head, _state_digest(head))
    number = versions.current if version is None else version
    if not 0 <= number < len(versions.versions):
        reject("version", number, f"a number from 0 to {len(versions.versions) - 1}")
    return _rebuilt(head, versions, number, backend), number


def _check_of(journal: Versions, head: FrozenHead, state: str) -> None:
    """Raise CheckpointError unless the journal has the head, whose state digest is given, among its versions."""
    if journal.identity != head_identity(head):
        raise CheckpointError(f"journal: got {str(journal.path)!r}, which is of another head (features differ)")
    count = posterior_of(head).count
    for version in journal.versions:
        if version.state == state and version.count != count:
            raise CheckpointError(
                f"journal: got {str(journal.path)!r}, whose version {version.number} has {version.count} data, "
                f"expected {count}, this head's"
            )
    if state not in {version.state for version in journal.versions}:
        raise CheckpointError(
            f"journal: got {str(journal.path)!r}, which has no version equal to this head, expected the head it "
            "began with or one it led to"
        )


def check_same_features(head: FrozenHead, other: FrozenHead) -> None:
    """Raise InputError unless the heads are versions of one: the same features."""
    if head is not other and head_identity(head) != head_identity(other):
        reject("head", "one with other features", "a version of the head that there is: the same features")


def _rebuilt(base: FrozenHead, journal: Versions, number: int, backend: Backend) -> FrozenHead:
    """The head of a version: from the last snapshot on its way from version 0, the updates since then replayed."""
    versions = journal.versions
    way = [number]
    while not versions[way[-1]].snapshot:
        parent = versions[way[-1]].parent
        assert parent is not None  # version 0 has a snapshot
        way.append(parent)
    head = _from_snapshot(base, journal.snapshot_tensors(way[-1]), versions[way[-1]].count)
    for step in reversed(way[:-1]):
        tensors = journal.update_tensors(step)
        beta = tensors.pop("beta").to(head.device)
        data = JudgedPairs.of(tensors).to(head.device)
        posterior, _ = with_data(head, beta, data, backend)
        rows = head.rows_with(data.hidden, data.pairs, data.weights, backend=backend)
        head = FrozenHead(head.config, head.feature_map, beta, head.beta0, posterior, rows=rows)
    if _state_digest(head) != versions[number].state:
        raise CheckpointError(
            f"journal: got {str(journal.path)!r}, whose "
            f"version {number}, replayed from version {way[-1]}, has other bits than when it was learned: "
            f"another machine, backend or build, or damage. Version {way[-1]} has a snapshot and can be had exactly"
        )
    head.build_weights()
    return head


def _snapshot(head: FrozenHead) -> dict[str, Tensor]:
    weights, rows = head.weights, head.rows
    of_rows: dict[str, Tensor] = {}
    if rows is not None:
        of_rows = row_tensors(rows) | {
            "row_factor_scale": torch.tensor(rows.weights.factor_scale, dtype=torch.float64),
            "row_count": torch.tensor(rows.count or 0),
        }
    return {
        **of_rows,
        "beta": head.beta,
        "gram": reference.pack_lower(posterior_of(head).gram, TILE),
        **weights.stored_tensors(),
        "factor_scale": torch.tensor(weights.factor_scale, dtype=torch.float64),
    }


def _from_snapshot(base: FrozenHead, tensors: Mapping[str, Tensor], count: int) -> FrozenHead:
    on = {name: tensor.to(base.device) for name, tensor in tensors.items()}
    known = posterior_of(base)
    posterior = Posterior.from_gram(
        reference.unpack_lower(on["gram"], known.num_features), count, ridge=known.ridge, likelihood=known.likelihood
    )
    weights = base.weights.with_stored(on, float(tensors["factor_scale"]))
    rows = None
    if base.rows is not None and base.config.row_ridge is not None:
        rows = row_posterior(
            weights,
            on,
            base.config.row_ridge,
            prior=base.rows.prior,
            factor_scale=float(tensors["row_factor_scale"]),
            count=int(tensors["row_count"]),
        )
    return FrozenHead(base.config, base.feature_map, on["beta"], base.beta0, posterior, weights, rows)


def head_identity(head: FrozenHead) -> dict[str, Any]:
    """What stays the same in all versions of a head, JSON values."""
    return {
        "config": head.config.to_dict(),
        "beta0": head.beta0,
        "dtype": str(head.dtype).removeprefix("torch."),
        "scales": [head.feature_map.input_scale, head.feature_map.feature_scale],
        "features": _digest(head.feature_map.tensors()),
    }


def beta_digest(head: FrozenHead) -> str:
    """Hex sha256 of β: which version of a head this is, also where it came without its posterior."""
    return _digest({"beta": head.beta})


def _state_digest(head: FrozenHead) -> str:
    posterior = posterior_of(head)
    tensors = {"beta": head.beta, "gram": reference.pack_lower(posterior.gram, TILE)}
    if head.rows is not None and head.rows.posterior is not None:  # left out without, as in older journals
        tensors["row_gram"] = reference.pack_lower(head.rows.posterior.gram, TILE)
    return _digest(tensors, posterior.count)


def _digest(tensors: Mapping[str, Tensor], *values: object) -> str:
    sha256 = hashlib.sha256(repr(values).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha256.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        sha256.update(tensor.view(torch.uint8).numpy().data)
    return sha256.hexdigest()
