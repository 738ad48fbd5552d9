"""A saved model as a command's options say, its encoded states kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rmcore.cli.checks import Kept
from rmcore.cli.options import Loading

if TYPE_CHECKING:
    from rmcore.model.reward_model import RewardModel

__all__ = ["load_model"]


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
