"""``rmcore train --critiques``: a head on the frozen states of responses behind their critiques."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rmcore._base.errors import reject
from rmcore.cli.checks import Kept, save_or_say

if TYPE_CHECKING:
    import torch

    from rmcore.head.config import HeadConfig
    from rmcore.model.backbone import Backbone
    from rmcore.model.training_pairs import Preference

__all__ = ["check_critiques", "train_critiques"]


def check_critiques(items: Sequence[Preference], others: Sequence[object], *, streamed: bool = False) -> None:
    """Raises InputError for preferences without critiques, and for options that cannot go with them."""
    if any(other not in (None, False, 0, []) for other in others):
        reject(
            "--critiques",
            "with --tune, --epochs, --uncertainty, --ai-labels, --attributes or several processes",
            "it alone, or with a backbone that is trained",
        )
    if not streamed and not any(item.critiques for item in items):
        reject("--critiques", "preferences without critiques", "a column critiques", "rmcore critique writes one")


def train_critiques(
    spine: Backbone,
    items: Sequence[Preference],
    held_out: Sequence[Preference],
    config: HeadConfig,
    dtype: torch.dtype | None,
    progress: Callable[[str, int, int], None],
    out: Path,
    kept: Kept,
    *,
    embed: bool,
    error_prior: bool,
) -> str:
    """Encode, fit, calibrate on ``held_out`` if there is any, save; what to say of it."""
    import torch

    from rmcore.head.fit import fit, fit_amplitude
    from rmcore.head.sngp import SNGPHead
    from rmcore.model.critiqued_data import encode_critiqued
    from rmcore.model.error_prior_fit import error_prior_of
    from rmcore.model.reward_model import RewardModel

    def note(done: int, total: int) -> None:
        progress("encoding", done, total)

    data = encode_critiqued(spine, items, progress=note)
    head = SNGPHead(replace(config, hidden_size=spine.hidden_size)).to(spine.device)
    frozen, report = fit(head, data.hidden, data.labels, pairs=data.pairs, sample_weight=data.weights, dtype=dtype)
    if held_out:
        unseen = encode_critiqued(spine, held_out, progress=note)
        scores = frozen.score_pairs(unseen.hidden, unseen.states.rows.to(unseen.hidden.device))
        found = unseen.states.pairs(scores.logit, scores.variance)
        labels = unseen.labels.new_tensor([held_out[k].label for k in unseen.kept])
        calibrated = fit_amplitude(frozen, found.logit, found.variance, labels.to(found.logit.device))
        frozen = frozen if calibrated.config.resolved_amplitude == 0 else calibrated
    how: Literal["name", "embed"] = "embed" if embed else "name"
    model = RewardModel(spine, frozen)
    model.critiqued = True
    if error_prior:
        # Of each response behind its first critique: a row a response, as routers that learn know them.
        rows = data.states.firsts.view(-1, 2)
        kept_items, own = [items[k] for k in data.kept], data.hidden[rows.flatten().to(data.hidden.device)]
        labels = torch.tensor([item.label for item in kept_items], dtype=torch.float32, device=own.device)
        pairs = torch.arange(len(own), device=own.device).view(-1, 2)
        model.error_prior = error_prior_of(frozen.config, kept_items, own, labels, pairs)
    save_or_say(out, lambda path: model.save_pretrained(path, backbone=how), kept)
    states = int(data.states.rows.sum())
    return (
        f"{len(data.kept)} pairs behind {states} critiques; Newton {'converged' if report.converged else 'stopped'} "
        f"after {report.passes} passes" + "; no error prior" * (model.error_prior is None)
    )
