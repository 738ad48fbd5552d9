"""The state of an engine that a restart must not lose: what its router has spent and seen, which head it serves.

The learned head itself lies in its learner's journal; the state says which version of it was served.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

from rmcore._base.errors import CheckpointError
from rmcore.engine.learning.learner import VerdictLearner, beta_digest, head_identity
from rmcore.engine.routing import Router, StatefulRouter
from rmcore.engine.routing.state import read_state
from rmcore.head.frozen import FrozenHead

__all__ = ["KeptEngine", "engine_state", "load_engine_file", "load_engine_state"]

_FORMAT, _VERSION = "rmcore-engine", 1


class KeptEngine(Protocol):
    """What of a :class:`~rmcore.engine.RewardEngine` its state is about."""

    router: Router
    head: FrozenHead
    learner: VerdictLearner | None

    def revert(self, version: int) -> None:
        """Serve another version of the learner's head."""
        ...


def engine_state(engine: KeptEngine) -> dict[str, Any]:
    """The state as JSON values. What is in flight counts as spent."""
    router, learner = engine.router, engine.learner
    at = None if learner is None else learner.versions[learner.version]
    head = engine.head if learner is None else learner.head
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "head": head_identity(head),
        "beta": beta_digest(head),
        "learner": None if at is None else {"version": at.number, "state": at.state},
        "router": {
            "kind": type(router).__qualname__,
            "state": router.state_dict() if isinstance(router, StatefulRouter) else None,
        },
    }


def load_engine_state(engine: KeptEngine, state: object) -> None:
    """Make the engine go on from a state of :func:`engine_state`.

    Raises:
        CheckpointError: the state is damaged, or of another router, another head or another journal; the message says
            which. Nothing is changed.
        InputError: reservations are in flight.
    """
    from rmcore._base.states import checked, refuse
    from rmcore.engine.state_schema import EngineState

    found = checked(EngineState, state, "engine")
    router, learner = engine.router, engine.learner
    kind = type(router).__qualname__
    if found.router.kind != kind:
        refuse("engine.router", found.router.kind, f"{kind}, as this engine was made with")
    if (found.router.state is None) == isinstance(router, StatefulRouter):
        expected = "its state" if found.router.state is None else "no state, since this router has none"
        refuse("engine.router.state", "none" if found.router.state is None else "a state", expected)
    if found.head != head_identity(engine.head):
        refuse("engine.head", "another head (its features differ)", "that of this engine's model")
    if found.learner is not None and learner is None:
        refuse(
            "engine.learner", f"version {found.learner.version}", "none: make the engine with that learner's journal"
        )
    if found.learner is None and found.beta != beta_digest(engine.head):
        refuse("engine.head", "another head (β differs)", "that of this engine's model, or a learner with its journal")
    version = None
    if learner is not None and found.learner is not None:
        version = _version(learner, found.learner.version, found.learner.state)
    before = router.state_dict() if isinstance(router, StatefulRouter) else None
    if isinstance(router, StatefulRouter):
        router.load_state_dict(found.router.state)
    try:
        if learner is not None and version is not None and version != learner.version:
            engine.revert(version)
    except BaseException:
        if isinstance(router, StatefulRouter):
            router.load_state_dict(before)
        raise


def load_engine_file(engine: KeptEngine, path: str | os.PathLike[str]) -> None:
    """:func:`load_engine_state` from a JSON file, which messages name."""
    state = read_state(path)
    try:
        load_engine_state(engine, state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _version(learner: VerdictLearner, number: int, digest: str) -> int:
    """The learner's version with this state; its number alone would also fit another run's journal."""
    versions = learner.versions
    if number < len(versions) and versions[number].state == digest:
        return number
    raise CheckpointError(
        f"engine.learner: got version {number} of a head, expected one that this learner's journal has (it has "
        f"{len(versions)}, and none such under that number). Open the journal that the state was saved with"
    )
