"""What a backbone is made from: a folder or the hub's files, a published reward model, a server of hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

import torch

from rmcore._base.client.options import ClientOptions
from rmcore._base.errors import reject
from rmcore.model.backbone_config import BackboneConfig
from rmcore.model.devices import checked_device
from rmcore.model.encoding.tree_attention import Packing
from rmcore.model.families.load import Loaded, config_for, load_family
from rmcore.model.families.remote_code import check_own_scores
from rmcore.model.folder_files import check_files, folder_digests
from rmcore.model.hub import folder_of
from rmcore.model.hub_adapter import hub_adapter
from rmcore.model.loading import REMOTE_CODE, Options, configured, gguf_named, is_quantised, load, tree_kinds, with_base
from rmcore.model.remote import RemoteModel, ServerKind

__all__ = ["BackboneLoading", "Deterministic"]

Deterministic: TypeAlias = Literal["batch"]
"""What bits do not depend on: ``batch``, the other texts of a call."""


class BackboneLoading:
    """The ways to a :class:`~rmcore.model.backbone.Backbone`, whose class methods these are."""

    if TYPE_CHECKING:

        def __init__(self, model: Any, tokenizer: Any, config: BackboneConfig, **options: Any) -> None:
            self.config = config

    @classmethod
    def from_pretrained(
        cls,
        config: BackboneConfig | str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        attn_implementation: str = "auto",
        tokens_per_batch: int = 8192,
        packing: Packing = "auto",
        deterministic: Deterministic | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        expected_files: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a backbone by hub name or folder. Only safetensors files are read as weights.

        What is loaded is what ``config`` of the result names: a folder by its absolute path, a hub name with the
        commit as ``revision``, so that a saved model finds the same weights from anywhere and at any time.

        Args:
            config: a name, or a :class:`BackboneConfig`.
            device: None takes CUDA if there is one.
            dtype: None takes bfloat16 on a GPU, float32 on a CPU.
            attn_implementation: transformers' option of that name, or ``auto``. One that is asked for also decides
                how packed trees attend: ``sdpa`` and ``flex_attention`` with that, and with any other, which has no
                form for trees, ``packing="auto"`` gives every text a row of its own.
            tokens_per_batch: tokens of one forward pass.
            packing: see :class:`~rmcore.model.backbone.Backbone`.
            deterministic: see :class:`~rmcore.model.backbone.Backbone`.
            cache_dir: where the hub's files are kept; None is huggingface_hub's cache.
            local_files_only: take what is in the cache, and do not ask the hub.
            trust_remote_code: run the Python files that come with a model. They can do whatever you can.
            expected_files: the ``files`` that a folder had when something was fitted on it.
            kwargs: fields of :class:`BackboneConfig` where ``config`` is a name. ``revision`` is one.

        A private repository needs HF_TOKEN in the environment, or ``hf auth login``.

        Raises:
            CheckpointError: the name cannot be loaded; the message carries the loader's reason. Or the folder's files
                are not the expected ones; the message names them.
            InputError: an argument that :class:`BackboneConfig` or this function does not have.
        """
        config = gguf_named(configured(config, kwargs))
        device = checked_device(device)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        options = Options(cache_dir, local_files_only, trust_remote_code)
        adapter = hub_adapter(config, options)
        config = config if adapter is None else adapter.local
        folder = folder_of(config.name, config.revision)
        recorded = expected_files or {}
        code = trust_remote_code or any(name.endswith(".py") for name in recorded)
        files = {} if folder is None else folder_digests(folder, code=code, gguf=config.gguf_file)
        files, options = with_base(files, recorded, options)
        if folder is not None and recorded:
            check_files(folder, recorded, files)
        published: Loaded | None = None
        if config.kind == "reward":
            published = load_family(config, device, dtype, attn_implementation, options)
            config, model, tokenizer = published.config, published.model, published.tokenizer
            attention = published.attention
        else:
            config, model, tokenizer, attention = load(config, device, dtype, attn_implementation, options)
        if adapter is not None:
            config = adapter.by_name(config)
        return cls(
            # Quantised weights are where their library has put them; a GGUF's are floats by now.
            (model if is_quantised(model) else model.to(device)).eval(),
            tokenizer,
            config,
            tokens_per_batch=tokens_per_batch,
            attention=attention,
            packing=packing,
            tree_kinds=tree_kinds(attn_implementation),
            files=files,
            published=published,
            deterministic=deterministic,
        )

    @classmethod
    def from_reward_model(
        cls,
        name: str,
        *,
        family: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        attn_implementation: str = "auto",
        tokens_per_batch: int = 8192,
        packing: Packing = "auto",
        deterministic: Deterministic | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a published reward model, of whatever family it is (:mod:`rmcore.model.families`).

        Args:
            name: a hub name or a folder.
            family: its family's name; None finds it by configuration and tensors.
            cache_dir: where the hub's files are kept; None is huggingface_hub's cache.
            local_files_only: take what is in the cache, and do not ask the hub.
            trust_remote_code: run the Python files of a model that is of no family. They can do whatever you can.
            device: as the next four, see :meth:`from_pretrained`.
            dtype: of the body.
            attn_implementation: transformers' option of that name, or ``auto``.
            tokens_per_batch: tokens of one forward pass.
            packing: how shared beginnings are encoded.
            deterministic: ``batch`` for the same bits whatever a text is batched with.
            **kwargs: further fields of :class:`BackboneConfig`. ``revision`` is one.

        Raises:
            CheckpointError: as :meth:`from_pretrained`; or the model is of no family, has tensors missing or left
                over, or a configuration key that may change scores and that its family does not know. Each is named.
            InputError: a family there is not.
        """
        options = Options(cache_dir, local_files_only, trust_remote_code)
        config = configured(name, kwargs)
        if family is not None:
            config = replace(config, kind="classifier", pooling="classifier", family=family)
        adapter = hub_adapter(config, options)
        config = config if adapter is None else adapter.local
        found = cls.from_pretrained(
            config_for(config, options),
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            tokens_per_batch=tokens_per_batch,
            packing=packing,
            deterministic=deterministic,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
        )
        if adapter is not None:
            found.config = adapter.by_name(found.config)
        if found.config.family == REMOTE_CODE:
            check_own_scores(found)
        return found

    @classmethod
    def from_server(
        cls,
        url: str,
        *,
        tokenizer: Any,
        server: ServerKind = "vllm",
        model: str | None = None,
        api_key_env: str | None = None,
        client: ClientOptions | None = None,
        deadline_s: float | None = None,
        config: BackboneConfig | None = None,
        **kwargs: Any,
    ) -> Self:
        """A backbone whose states come from a vLLM, SGLang or llama.cpp server (:mod:`rmcore.model.remote`).

        Tokens are made here and sent as ids; the server computes the body, and shares prefixes as it does for all its
        requests; pooling, head and everything behind them are here. With ``last`` pooling one state a text crosses the
        network, with ``mean`` and ``first`` those of all its tokens. Use the result as the ``backbone`` of
        :meth:`RewardModel.from_pretrained <rmcore.model.reward_model.RewardModel.from_pretrained>`.

        Args:
            url: of the server, without a path.
            tokenizer: of the served model, or its hub name or folder.
            server: which one it is.
            model: its name there; None takes the first that is served.
            api_key_env: environment variable with the server's key, if it wants one.
            client: a judge's limits, retries, breaker and timeouts, for requests of up to 8 texts each
                (:class:`rmcore.judge.ClientOptions`); None is :data:`rmcore.model.remote.REMOTE_OPTIONS`.
            deadline_s: most seconds for all the requests of a forward pass; None for no limit of its own.
            config: what a text's hidden state is, of kind ``base``.
            **kwargs: fields of :class:`BackboneConfig` where there is no ``config``.

        Raises:
            BackendError: the server does not answer, or with states that are not the model's own (normalised, say).
            InputError: a configuration that a server cannot serve: a kind besides ``base``, or a layer.
        """
        config = config or BackboneConfig.from_dict(kwargs)
        if config.kind != "base" or config.layer is not None:
            reject("config", f"kind {config.kind!r}, layer {config.layer}", "kind 'base' without a layer")
        if isinstance(tokenizer, (str, Path)):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        remote = RemoteModel(
            url,
            model=model,
            server=server,
            api_key_env=api_key_env,
            client=client,
            deadline_s=deadline_s,
        )
        return cls(remote.eval(), tokenizer, config, attention=("server", url), packing="padded")
