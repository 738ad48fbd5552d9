"""A reward model on a disk and on the hub: written, pushed and loaded, a published one as it is among them."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore._base.files import atomic_folder
from rmcore.head import checkpoint
from rmcore.head.config import HeadConfig, PairMode
from rmcore.head.estimators import PairEstimator
from rmcore.head.fit import without_posterior
from rmcore.head.frozen import FrozenHead
from rmcore.model import hub
from rmcore.model.backbone import Backbone, Deterministic
from rmcore.model.encoding.tree_attention import Packing
from rmcore.model.error_prior import ErrorPrior
from rmcore.model.folder_files import BASE, folder_digests
from rmcore.model.model_folder import ModelParts, read_model, write_model
from rmcore.model.text import OverlongPolicy, TextLimit

__all__ = ["RewardModelFiles"]

log = logging.getLogger("rmcore.model.reward_model")


class RewardModelFiles:
    """How a :class:`~rmcore.model.reward_model.RewardModel` is kept and loaded; these are its methods."""

    if TYPE_CHECKING:
        backbone: Backbone
        head: FrozenHead
        estimators: dict[str, PairEstimator]
        uncertainty: str | None
        critiqued: bool | None

        def __init__(self, backbone: Backbone, head: FrozenHead, error_prior: ErrorPrior | None = None) -> None: ...

        def _parts(self) -> ModelParts: ...

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        backbone: Literal["name", "embed"] = "name",
        include_posterior: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the model as one folder, atomically.

        Args:
            path: a new folder, or one rmcore wrote before, which is replaced.
            backbone: ``name`` stores where to load it from, ``embed`` stores its weights and tokenizer too.
            include_posterior: keep the posterior, so that the head can learn further.
            state_dict: with ``embed`` the backbone's weights, where they are gathered from several processes.
        """
        if backbone not in ("name", "embed"):
            reject("backbone", repr(backbone), "'name' or 'embed'")
        from safetensors import SafetensorError

        with atomic_folder(path, marker=checkpoint.CONFIG_FILE) as folder:
            try:
                embed = backbone == "embed"
                write_model(
                    self._parts(), folder, embed=embed, include_posterior=include_posterior, state_dict=state_dict
                )
            except SafetensorError as error:  # as it reports a disk that is full, say
                raise OSError(f"{os.fspath(path)}: {error}") from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload reward model",
        private: bool | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        backbone: Literal["auto", "name", "embed"] = "auto",
        include_posterior: bool = True,
    ) -> str:
        """Push the model to the hub, in one commit: safetensors, JSON and tokenizer files, and a model card if new.

        Args:
            repo_id: ``owner/name``; created where it is not there yet.
            commit_message: of the commit.
            private: of a repository that is created; None takes the owner's default.
            branch: to commit to; None for the default one.
            create_pr: open a pull request instead.
            backbone: ``name`` records the backbone's hub name and commit, ``embed`` pushes its weights and tokenizer
                too, ``auto`` the first where it came from the hub and else the second.
            include_posterior: keep the posterior, so that the head can learn further.

        The token is HF_TOKEN of the environment, or ``hf auth login``'s; it is not taken as an argument.

        Returns:
            The commit's URL.

        Raises:
            CheckpointError: the hub does not take it; the message names repository and branch, and why.
            InputError: ``name`` for a backbone that nobody else can load.
        """
        if backbone not in ("auto", "name", "embed"):
            reject("backbone", repr(backbone), "'auto', 'name' or 'embed'")
        config = self.backbone.config
        on_hub = bool(config.name) and config.revision is not None and not self.backbone.changed
        if backbone == "name" and not on_hub:
            reject("backbone", f"'name' for {config.name!r}, which is not on the hub", "'embed' or 'auto'")
        embed = backbone == "embed" or not on_hub
        to = hub.Upload(repo_id, commit_message, branch, private, create_pr)
        with tempfile.TemporaryDirectory() as folder:
            write_model(self._parts(), Path(folder), embed=embed, include_posterior=include_posterior)
            if embed and any(name.startswith(f"{BASE}/") for name in folder_digests(Path(folder) / "backbone")):
                reject(
                    "backbone",
                    "an adapter of a model in a folder of this machine",
                    "one of a model on the hub, or merged weights",
                )
            return hub.upload(Path(folder), hub.model_card(repo_id, self.head, config, embedded=embed), to)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        attn_implementation: str = "auto",
        tokens_per_batch: int = 8192,
        packing: Packing = "auto",
        deterministic: Deterministic | None = None,
        trust_remote_code: bool = False,
        family: str | None = None,
        max_length: int | None = None,
        overlong: OverlongPolicy | None = None,
        backbone: Backbone | None = None,
    ) -> Self:
        """Load a model of :meth:`save_pretrained` or :meth:`push_to_hub`, or a published reward model.

        A published one (:mod:`rmcore.model.families`) scores as its authors' code does, and has no uncertainties
        (:meth:`as_published`); :meth:`upgrade` gives it some.

        Args:
            name: a folder, or the model's name on the hub. What is a folder here is never looked for on the hub.
            revision: on the hub: branch, tag or commit; None for the default branch.
            cache_dir: where the hub's files are kept; None is huggingface_hub's cache.
            local_files_only: take what is in the cache, and do not ask the hub.
            device: of the backbone, as are the next five; see :meth:`rmcore.model.backbone.Backbone.from_pretrained`.
            dtype: arithmetic of the backbone.
            attn_implementation: transformers' option of that name, or ``auto``.
            tokens_per_batch: tokens of one forward pass.
            packing: how texts that begin alike are encoded.
            deterministic: ``batch`` for the same bits whatever a group is scored with; it costs batching and sharing.
            trust_remote_code: run Python files that come with the backbone.
            family: of a published reward model; None finds it by configuration and tensors.
            max_length: most tokens of a text, instead of what the model was saved with.
            overlong: what happens to longer texts, likewise (:data:`~rmcore.model.text.OverlongPolicy`).
            backbone: use this one instead of loading the one recorded (it must be as wide).

        A private repository needs HF_TOKEN in the environment, or ``hf auth login``; tokens are not taken as arguments.

        Raises:
            CheckpointError: anything truncated, foreign or inconsistent, or a backbone whose files are not those the
                model was saved with (the message names them); on the hub a repository or revision that is
                not there, gated, or not in the cache while offline. The message names both.
            InputError: a revision beside a folder, a backbone given that is not as wide as the head, a limit beside it
                or one that the backbone has no positions for.
        """
        limits: dict[str, Any] = {"max_length": max_length, "overlong": overlong}
        limits = {key: value for key, value in limits.items() if value is not None}
        TextLimit(**limits)
        if backbone is not None and limits:
            reject("max_length, overlong", "given beside a backbone", "None: they belong to the backbone's config")
        folder = hub.folder_of(name, revision, expected=f"a folder with {checkpoint.CONFIG_FILE}") or hub.download(
            os.fspath(name), revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
        )
        loading: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "attn_implementation": attn_implementation,
            "tokens_per_batch": tokens_per_batch,
            "packing": packing,
            "deterministic": deterministic,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "trust_remote_code": trust_remote_code,
        }
        if backbone is None and not (folder / checkpoint.CONFIG_FILE).is_file() and (folder / "config.json").is_file():
            given = {"revision": revision, "family": family, **limits}
            own = Backbone.from_reward_model(os.fspath(name), **given, **loading)
            log.info("%s: u is 1 everywhere until `rmcore upgrade` fits a posterior", name)
            return cls.as_published(own)
        if family is not None:
            reject("family", repr(family), "None for a model that rmcore wrote: its folder says")
        read = read_model(folder, os.fspath(name), backbone=backbone, limits=limits, loading=loading)
        model = cls(read.backbone, read.head, read.error_prior)
        model.estimators, model.uncertainty, model.critiqued = read.estimators, read.uncertainty, read.critiqued
        return model

    @classmethod
    def as_published(cls, backbone: Backbone) -> Self:
        """A published reward model as it is, with its own scores and no uncertainties: u is 1 everywhere.

        v is the prior's, which no data has seen. :meth:`upgrade` fits a posterior.
        """
        beta, beta0 = backbone.scalar_head()
        mode: PairMode = "concat" if backbone.pairwise else "difference"
        own: dict[str, Any] = {"mode": mode, "features": "linear", "order_mean": backbone.order_mean}
        config = HeadConfig(backbone.hidden_size, amplitude=0.0, **own)
        model = cls(backbone, without_posterior(beta, beta0, config))
        published = backbone.published
        model.critiqued = published is not None and bool(published.pooler.family.language)
        return model
