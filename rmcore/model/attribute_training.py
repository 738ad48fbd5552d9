"""A reward model of several attributes (URM, URME) from labelled responses, over a backbone that stays as it is.

Stage 1 learns each attribute's mean and σ from its labels, stage 2 a gate that makes one reward of them from pairs.
Beside them the library's own head is fitted on the same pairs: its posterior is what routers and learners go by.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore._base.progress import Progress
from rmcore._base.prompt import content_key
from rmcore.head.config import HeadConfig
from rmcore.head.estimators import URM, URME, AttributeLabels
from rmcore.head.fit import fit
from rmcore.head.sngp import SNGPHead
from rmcore.model.backbone import Backbone
from rmcore.model.data.attributes import AttributeRow, check_attributes
from rmcore.model.reward_model import RewardModel
from rmcore.model.training_pairs import Preference, encode_preferences

__all__ = ["AttributeFit", "attribute_pairs", "fit_attribute_model"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttributeFit:
    """What was trained on.

    Attributes:
        responses: with a label.
        pairs: preference pairs.
        derived: whether they were made of the labels.
        ties: pairs of one prompt left out because the attribute that decides is equal, or not labelled.
        accuracy: share of the pairs that the model orders right, in training.
    """

    responses: int
    pairs: int
    derived: bool
    ties: int
    accuracy: float


def attribute_pairs(rows: Sequence[AttributeRow], by: int) -> tuple[list[Preference], int]:
    """Pairs of the responses of one prompt: the one with the higher label of attribute number ``by`` is preferred.

    So HelpSteer2's authors made theirs of helpfulness (arXiv:2406.08673), leaving out ties, whose count is given too;
    a pair with an unlabelled response counts among them.
    """
    prompts: dict[Hashable, list[AttributeRow]] = {}
    for row in rows:
        prompts.setdefault(content_key(row.prompt), []).append(row)
    found, ties = [], 0
    for group in prompts.values():
        for one, other in itertools.combinations(group, 2):
            a, b = one.labels[by], other.labels[by]
            if a > b:
                found.append(Preference(one.prompt, one.response, other.response))
            elif b > a:
                found.append(Preference(one.prompt, other.response, one.response))
            else:
                ties += 1
    return found, ties


def fit_attribute_model(
    backbone: Backbone,
    rows: Sequence[AttributeRow],
    names: Sequence[str],
    *,
    preferences: Sequence[Preference] | None = None,
    prefer: str | None = None,
    members: int = 1,
    config: HeadConfig | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **training: Any,
) -> tuple[RewardModel, AttributeFit]:
    """Train URM, or with several ``members`` URME; the model is served with it (``RewardModel.uncertainty``).

    Args:
        backbone: makes hidden states; it is not changed.
        rows: labelled responses.
        names: of the attributes, as the rows have them.
        preferences: pairs for stage 2 and the head. None: made of the labels (:func:`attribute_pairs`).
        prefer: the attribute by which; None for the first.
        members: heads.
        config: of the library's head beside them, difference mode; None takes defaults.
        dtype: serving dtype of that head.
        seed: of the first attribute head.
        progress: called with (what is done, units done, units in all).
        **training: fields of :class:`rmcore.head.estimators.attributes.HeadTraining`: gate, weights, objective, ...

    Raises:
        InputError: no rows or pairs, an attribute that nobody labelled, names that do not fit, a config in concat mode.
        NonFiniteError: states that are not finite, or a training that diverged.
    """
    names, config = tuple(names), config or HeadConfig(backbone.hidden_size)
    check_attributes(names)
    if config.mode != "difference":
        reject("config", "one in concat mode", "one in difference mode: attributes are of a response")
    if not rows:
        reject("rows", "none", "at least one")
    if any(len(row.labels) != len(names) for row in rows):
        reject("names", f"{len(names)}", f"{len(rows[0].labels)}, as rows have labels")
    if prefer is not None and prefer not in names:
        reject("prefer", repr(prefer), f"one of {', '.join(names)}")
    if members < 1:
        reject("members", members, "at least 1")
    derived, ties = preferences is None, 0
    if preferences is None:
        preferences, ties = attribute_pairs(rows, names.index(prefer or names[0]))
    if not preferences:
        reject("preferences", f"no pair, {ties} ties", "responses of one prompt with different labels, or pairs")
    said = AttributeLabels(names, *_labelled(backbone, rows, progress))
    hidden, labels, pairs = encode_preferences(backbone, preferences, "difference", progress=progress)
    assert pairs is not None
    note = None if progress is None else (lambda _line: progress("fitting", 0, 0))
    head, _ = fit(SNGPHead(config).to(hidden.device), hidden, labels, pairs=pairs, dtype=dtype, progress=note)
    model = RewardModel(backbone, head)
    states = (hidden.cpu(), labels.cpu(), pairs.cpu())
    prompts: dict[Hashable, int] = {}
    groups = torch.tensor([prompts.setdefault(content_key(item.prompt), len(prompts)) for item in preferences])
    if len(groups) != len(pairs):  # some told nothing and were left out
        groups = torch.arange(len(pairs))
    training = {"groups": groups, **training}
    how = {"attributes": said, "seed": seed, "progress": progress, **training}
    estimator = URM.fit(*states, **how) if members == 1 else URME.fit(*states, members=members, **how)
    model.estimators[estimator.name], model.uncertainty = estimator, estimator.name
    reward = estimator.rewards(states[0])
    right = (reward[states[2][:, 0]] > reward[states[2][:, 1]]) == (states[1] > 0.5)
    return model, AttributeFit(len(said.labels), len(pairs), derived, ties, float(right.double().mean()))


def _labelled(backbone: Backbone, rows: Sequence[AttributeRow], progress: Progress | None) -> tuple[Tensor, Tensor]:
    """States (N, h) and labels (N, A) of the rows that have a label and were read."""
    kept = [row for row in rows if any(label == label for label in row.labels)]
    texts = [backbone.encoder.encode(row.prompt, row.response) for row in kept]
    read = [k for k, text in enumerate(texts) if not text.unread]
    if len(read) < len(kept):
        log.warning(
            "%d of %d labelled responses are too long and unread: they are left out", len(kept) - len(read), len(kept)
        )
    if not read:
        reject("rows", f"{len(rows)} without a label, or unread", "at least one labelled response")
    told = None if progress is None else (lambda done, total: progress("encoding", done, total))
    hidden = backbone.hidden([texts[k] for k in read], progress=told)
    return hidden.cpu(), torch.tensor([kept[k].labels for k in read], dtype=torch.float32)
