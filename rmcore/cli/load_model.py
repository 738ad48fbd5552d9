"""A saved model as a command's options say, its encoded states kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rmcore.cli.checks import Kept
from rmcore.cli.options import Loading

if TYPE_CHECKING:
    from rmcore.model.backbone import Backbone
    from rmcore.model.reward_model import RewardModel

__all__ = ["load_model", "reward_backbone"]


def load_model(
    model: str, loading: Loading, kept: Kept, *, deterministic: Literal["batch"] | None = None
) -> RewardModel:
    """Load it; what its backbone encodes is taken from the cache and put there, unless --no-cache."""
    from rmcore.model.reward_model import RewardModel

    loaded = RewardModel.from_pretrained(
        model,
        device=loading.device,
        attn_implementation=loading.attn_implementation,
        trust_remote_code=loading.trust_remote_code,
        deterministic=deterministic,
        max_length=loading.max_length,
        overlong=loading.overlong,
    )
    kept.use(loaded.backbone, cache=not loading.no_cache)
    return loaded


def reward_backbone(name: str, device: str | None) -> Backbone | None:
    """The backbone of a reward model that writes what it reads: rmcore's or CLoud's; None for any other model."""
    from rmcore._base.errors import CheckpointError
    from rmcore.head.checkpoint import CONFIG_FILE
    from rmcore.model.backbone import Backbone
    from rmcore.model.families.registry import family_of
    from rmcore.model.families.tensors import Checkpoint
    from rmcore.model.hub import folder_of
    from rmcore.model.reward_model import RewardModel

    if name.endswith(".gguf"):
        return None
    try:
        checkpoint = Checkpoint(name, None, folder_of(name), {"cache_dir": None, "local_files_only": False})
        ours = checkpoint.file(CONFIG_FILE) is not None
        known = () if ours else checkpoint.config().get("architectures") or ()
    except CheckpointError:
        return None  # whoever loads it as a language model says what is wrong
    if ours:
        return RewardModel.from_pretrained(name, device=device).backbone
    if set(known) & set(family_of("cloud").architectures):
        return Backbone.from_reward_model(name, device=device)
    return None
