"""``rmcore train --critiques``: a head on the frozen states of responses behind their critiques."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rmcore.cli.checks import Kept, save_or_say
from rmcore.cli.train.head import calibrated_or_told
from rmcore.cli.train.options import HeadOptions, RecipeOptions

if TYPE_CHECKING:
    from rmcore._base.progress import Progress
    from rmcore.cli.train.data import TrainingData
    from rmcore.model.backbone import Backbone

__all__ = ["train_critiques"]


def train_critiques(
    spine: Backbone,
    pairs: TrainingData,
    options: HeadOptions,
    recipe: RecipeOptions,
    progress: Progress,
    out: Path,
    kept: Kept,
) -> str:
    """Encode, fit, calibrate on pairs held out if there are any, save; what to say of it."""
    import torch

    from rmcore.head.fit import fit, fit_amplitude
    from rmcore.head.sngp import SNGPHead
    from rmcore.model.critiqued_data import encode_critiqued
    from rmcore.model.error_prior_fit import error_prior_of
    from rmcore.model.reward_model import RewardModel

    def note(done: int, total: int) -> None:
        progress("encoding", done, total)

    items, held_out = pairs.items, pairs.held_out
    data = encode_critiqued(spine, items, progress=note)
    head = SNGPHead(options.config(spine.hidden_size)).to(spine.device)
    frozen, report = fit(
        head,
        data.hidden,
        data.labels,
        pairs=data.pairs,
        sample_weight=data.weights,
        dtype=options.serving_dtype,
    )
    if held_out:
        unseen = encode_critiqued(spine, held_out, progress=note)
        scores = frozen.score_pairs(unseen.hidden, unseen.states.rows.to(unseen.hidden.device))
        found = unseen.states.pairs(scores.logit, scores.variance)
        labels = unseen.labels.new_tensor([held_out[k].label for k in unseen.kept])
        calibrated = fit_amplitude(frozen, found.logit, found.variance, labels.to(found.logit.device))
        frozen = calibrated_or_told(frozen, calibrated, len(held_out))
    model = RewardModel(spine, frozen)
    model.critiqued = True
    if recipe.error_prior:
        # Of each response behind its first critique: a row a response, as routers that learn know them.
        rows = data.states.firsts.view(-1, 2)
        kept_items, own = [items[k] for k in data.kept], data.hidden[rows.flatten().to(data.hidden.device)]
        labels = torch.tensor([item.label for item in kept_items], dtype=torch.float32, device=own.device)
        twos = torch.arange(len(own), device=own.device).view(-1, 2)
        model.error_prior = error_prior_of(frozen.config, kept_items, own, labels, twos)
    save_or_say(out, lambda path: model.save_pretrained(path, backbone=recipe.storing), kept)
    states = int(data.states.rows.sum())
    return (
        f"{len(data.kept)} pairs behind {states} critiques; Newton {'converged' if report.converged else 'stopped'} "
        f"after {report.passes} passes" + "; no error prior" * (model.error_prior is None)
    )
