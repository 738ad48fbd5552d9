"""The reward's state in the trainer's checkpoints: budgets, router and learned head go on where the policy does.

    checkpoint-200/rmcore_state.json   the engine's state of every rank (``RewardEngine.state_dict``)
    checkpoint-200/rmcore_head         with a learner, a copy of rank 0's head; ``rmcore_head-rank1`` of rank 1's
    rmcore_spent-rank0.json            beside the checkpoints: the router's state after the latest call of a rank

Every rank has an engine of its own, so a budget is a rank's: a limit of 12 calls on two ranks is 24 calls in all. What
was spent after the checkpoint that a run resumes from is spent all the same: budgets per run are the higher of the
checkpoint's and the latest call's.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field
from transformers.trainer_callback import TrainerCallback

from rmcore._base.errors import CheckpointError
from rmcore._base.states import FirstVersion, State, checked, refuse
from rmcore.engine.engine import RewardEngine
from rmcore.engine.routing import BudgetedRouter, StatefulRouter
from rmcore.engine.routing.state import keep_spent, read_state, write_state
from rmcore.head.checkpoint import save_head

__all__ = ["HEAD_FOLDER", "STATE_FILE", "KeptReward", "RewardStateCallback"]

log = logging.getLogger(__name__)

STATE_FILE = "rmcore_state.json"
HEAD_FOLDER = "rmcore_head"
_FORMAT, _VERSION = "rmcore-trainer-state", 1


class KeptReward(Protocol):
    """What of a :class:`~rmcore.integrations.trl.PairwiseReward` the callback needs."""

    @property
    def engine(self) -> RewardEngine:
        """Its engine, made if need be."""
        ...

    @property
    def keeps_state(self) -> bool:
        """Whether there is anything to keep."""
        ...


class TrainerFile(State):
    """What ``rmcore_state.json`` holds; an engine's state a rank."""

    format: Literal["rmcore-trainer-state"]
    version: FirstVersion
    global_step: Annotated[int, Field(ge=0)]
    ranks: Annotated[list[dict[str, Any]], Field(min_length=1)]


class RewardStateCallback(TrainerCallback):  # type: ignore[misc]
    """Writes the reward's state into every checkpoint and restores it when a run resumes.

    Made by ``reward.callback()``.

    Args:
        reward: whose engine.
        restore: False begins with the state the engine has, whatever the checkpoint says.
        checkpoint: the folder the run resumes from, where it is neither ``args.resume_from_checkpoint`` nor in
            ``args.output_dir``: the trainer does not tell callbacks the argument of ``train``.
    """

    def __init__(
        self, reward: KeptReward, *, restore: bool = True, checkpoint: str | os.PathLike[str] | None = None
    ) -> None:
        self.reward = reward
        self.restore = restore
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.begun = False
        """Whether :meth:`begin` was called: before that, nothing this run spent is noted."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on from the checkpoint, if the run resumes."""
        self.begin(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add to the checkpoint that was just written; every rank takes part."""
        if self.reward.keeps_state:
            self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.global_step)

    # -- the verbs ---------------------------------------------------------------------------------------------------

    def begin(self, args: Any, state: Any) -> None:
        """A run begins, or goes on from a checkpoint: to be called before its first rewards.

        Raises:
            CheckpointError: the checkpoint is not found, has no state of the reward, or one that does not fit.
        """
        if not self.reward.keeps_state:
            return
        self.begun = True
        if not state.global_step:
            _spent_file(Path(args.output_dir)).unlink(missing_ok=True)  # an earlier run's
        elif self.restore:
            self.load(self._resumed_from(args, state), state.global_step)

    def save(self, folder: Path, step: int) -> None:
        """Write the states of all ranks to ``folder``. Every rank must call this; rank 0 writes."""
        rank, count = _rank()
        engine = self.reward.engine
        told: tuple[dict[str, Any] | None, str] = (None, "")
        try:
            if isinstance(engine.router, BudgetedRouter) and not isinstance(engine.router, StatefulRouter):
                log.warning(
                    "%s has no state_dict: what it spent is not in the checkpoint", type(engine.router).__name__
                )
            told = (engine.state_dict(), "")
            if engine.learner is not None:
                save_head(engine.learner.head, folder / (f"{HEAD_FOLDER}-rank{rank}" if rank else HEAD_FOLDER))
        except Exception as error:
            if count == 1:
                raise
            told = (None, f"{type(error).__name__}: {error}")  # told to all ranks, or they would wait for this one
        ranks = _gathered(told, count)
        failed = [(k, why) for k, (_, why) in enumerate(ranks) if why]
        if failed:
            raise RuntimeError(f"rank {failed[0][0]} could not save the state of its reward: {failed[0][1]}")
        if rank == 0:
            states = [one for one, _ in ranks]
            document = {"format": _FORMAT, "version": _VERSION, "global_step": step, "ranks": states}
            write_state(folder / STATE_FILE, document)

    def load(self, folder: Path, step: int) -> None:
        """Make the engine go on from this rank's state in ``folder``. Raises as :meth:`begin`."""
        file = folder / STATE_FILE
        if not file.is_file():
            raise CheckpointError(
                f"{file}: missing, so the budgets and the router of this reward would begin anew. Resume from a "
                "checkpoint that was written with it, or pass reward.callback(restore=False) to the trainer's callbacks"
            )
        rank, count = _rank()
        try:
            found = checked(TrainerFile, read_state(file), "state")
            if found.global_step != step:
                refuse("state.global_step", found.global_step, f"{step}, the step the trainer resumes at")
            if len(found.ranks) != count:
                refuse("state.ranks", f"{len(found.ranks)} ranks", f"{count}: every rank has budgets of its own")
            own, spent = found.ranks[rank], _spent_file(folder.parent)
            if spent.is_file() and own.get("router"):
                own["router"]["state"] = keep_spent(own["router"].get("state"), read_state(spent))
            self.reward.engine.load_state_dict(own)
        except CheckpointError as error:
            raise CheckpointError(
                f"{file}: {error}. Or pass reward.callback(restore=False) to the trainer's callbacks, to begin anew"
            ) from None
        log.info("the reward goes on from %s", file)

    def note_spent(self, args: Any) -> None:
        """Keep what this rank has spent so far, so that a crash before the next checkpoint does not forget it."""
        router = self.reward.engine.router
        if self.begun and isinstance(router, BudgetedRouter) and isinstance(router, StatefulRouter):
            write_state(_spent_file(Path(args.output_dir)), router.state_dict())

    def _resumed_from(self, args: Any, state: Any) -> Path:
        if self.checkpoint is not None:
            return self.checkpoint
        named = getattr(args, "resume_from_checkpoint", None)
        places = [Path(named)] if isinstance(named, (str, os.PathLike)) and os.path.isdir(named) else []
        places.append(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        for place in places:
            if _is_of(place, state):
                return place
        raise CheckpointError(
            f"the trainer resumed at step {state.global_step} from a checkpoint that is none of "
            f"{[str(place) for place in places]}, so the state of its reward was not found. Pass "
            "reward.callback(checkpoint=...) with its folder to the trainer's callbacks"
        )


def _is_of(folder: Path, state: Any) -> bool:
    """Whether the trainer's state came from this checkpoint: another run's may have the same number."""
    try:
        saved = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        past = saved["log_history"]
        return bool(saved["global_step"] == state.global_step and past == state.log_history[: len(past)])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _spent_file(output: Path) -> Path:
    return output / f"rmcore_spent-rank{_rank()[0]}.json"


def _rank() -> tuple[int, int]:
    from accelerate import PartialState

    state = PartialState()
    return state.process_index, state.num_processes


def _gathered(value: Any, count: int) -> list[Any]:
    if count == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])
