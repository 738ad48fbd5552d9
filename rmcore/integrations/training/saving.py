"""What a run leaves behind: checkpoints that hold the head too, a model's folder, a repository on the hub."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from rmcore._base.errors import reject
from rmcore.head.frozen import FrozenHead
from rmcore.integrations.training.critique_tokens import save_language_model
from rmcore.integrations.training.posterior import EpochCovariance
from rmcore.integrations.training.replicated_head import ReplicatedHead
from rmcore.model.backbone import Backbone
from rmcore.model.reward_model import RewardModel

__all__ = ["SavesRewardModel"]

log = logging.getLogger(__name__)


class SavesRewardModel(Trainer):  # type: ignore[misc]
    """``Trainer`` whose checkpoints have the head's state beside the backbone's, and whose model is a RewardModel."""

    backbone: Backbone
    frozen: FrozenHead | None
    _replicated: ReplicatedHead
    _covariance: EpochCovariance | None

    def fit_posterior(self) -> FrozenHead:
        """The head with its posterior."""
        raise NotImplementedError

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            # First, so that what is pushed or rotated with the checkpoint is whole.
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            self._replicated.save(folder, None if self._covariance is None else self._covariance.tensors())
        super()._save_checkpoint(model, trial)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._replicated.load(self.state.best_model_checkpoint)

    @property
    def reward_model(self) -> RewardModel:
        """Backbone and frozen head as one model, the posterior fitted if it is not yet. InputError of a first stage."""
        if self.args.critique_sft:
            reject("critique_sft", True, "False: the first stage trains no reward. save_model writes a language model")
        model = RewardModel(self.backbone, self.frozen or self.fit_posterior())
        model.critiqued = bool(self.args.critiques)
        return model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write one folder that :meth:`RewardModel.from_pretrained` opens: head, posterior, backbone and tokenizer.

        Of a backbone with adapters those alone are written, with the name of what they belong to. Default folder:
        ``model`` below ``args.output_dir``. Checkpoints (``_internal_call``) are Trainer's own. With ``critique_sft``
        it is a folder of transformers' with the language model, adapters merged.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        self._write_model(Path(output_dir or os.path.join(self.args.output_dir, "model")))
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write_model(self, folder: Path) -> None:
        model = None if self.args.critique_sft else self.reward_model
        weights: Any = None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # Gathered with all ranks; under ZeRO-3 the first one alone is given them.
            weights = self.accelerator.get_state_dict(self.model_wrapped)
        if model is None and self.args.should_save:
            save_language_model(self.backbone, folder, weights)
        elif model is not None and self.args.should_save:
            model.save_pretrained(folder, backbone="embed", state_dict=None if weights is None else dict(weights))
        elif self.is_distributed_loading_by_transformers:  # transformers gathers while it writes, with all ranks
            self.model.save_pretrained(folder, is_main_process=False)
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # A checkpoint is no model that serves: it has no posterior. With "every_save", Trainer's default, its weights
        # would lie beside the model that is pushed at the end.
        if self.args.hub_strategy == HubStrategy.EVERY_SAVE:
            log.info("%s is not pushed: a model is, by save_model or push_to_hub", checkpoint_folder)
            return
        super()._push_from_checkpoint(checkpoint_folder)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push the model, as :meth:`RewardModel.push_to_hub` does, to ``args.hub_model_id``; the main process's URL.

        Raises InputError for a token as an argument: HF_TOKEN of the environment is taken. ``blocking`` is ignored:
        the commit is there when this returns.
        """
        if token is not None or self.args.hub_token is not None:
            reject("token", "one as an argument", "HF_TOKEN in the environment, or `hf auth login`")
        model = self.reward_model
        if not self.is_world_process_zero():
            return None
        name = self.args.hub_model_id or Path(self.args.output_dir).name
        return model.push_to_hub(
            name,
            commit_message=commit_message or "End of training",
            private=self.args.hub_private_repo if private is None else private,
            branch=revision,
        )
