"""How a reward model is fitted from preferences: a head of its own, uncertainties for a published one's, estimators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore._base.progress import Progress
from rmcore.head.config import HeadConfig, PairMode
from rmcore.head.estimators import PairEstimator, estimator_named
from rmcore.head.fit import FitReport, fit, upgrade
from rmcore.head.frozen import FrozenHead
from rmcore.head.ranks import Ranks, working
from rmcore.head.sngp import SNGPHead
from rmcore.model.agreement import require_same_tokens
from rmcore.model.backbone import Backbone
from rmcore.model.error_prior import ErrorPrior
from rmcore.model.error_prior_fit import error_prior_of
from rmcore.model.training_pairs import Preference, encode_preferences
from rmcore.model.uncertainties import fit_estimators

__all__ = ["RewardModelFitting"]


class RewardModelFitting:
    """The ways to fit a :class:`~rmcore.model.reward_model.RewardModel`, whose methods these are."""

    if TYPE_CHECKING:
        backbone: Backbone
        head: FrozenHead
        error_prior: ErrorPrior | None
        estimators: dict[str, PairEstimator]
        critiqued: bool | None

        def __init__(self, backbone: Backbone, head: FrozenHead, error_prior: ErrorPrior | None = None) -> None: ...

    @classmethod
    def fit(
        cls,
        backbone: Backbone,
        preferences: Sequence[Preference],
        config: HeadConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
        error_prior: bool = False,
        progress: Progress | None = None,
        ranks: Ranks | None = None,
        **kwargs: Any,
    ) -> tuple[Self, FitReport]:
        """Encode preferences once and fit a head on them (:func:`rmcore.head.fit.fit`).

        Args:
            backbone: a backbone; it is not changed.
            preferences: at least one pair. In concat mode each is used in both orders.
            config: the head; None takes defaults.
            dtype: serving dtype of the head.
            error_prior: find out where the head errs on pairs it was not fitted on, for routers that learn: five more
                fits, on at most 2,000 of the pairs.
            progress: progress callback.
            ranks: all of which call this, each with its own part of the preferences (none, if it must), which it
                encodes; all get one head, to the bit.
            **kwargs: fields of the head's configuration to override.

        Raises InputError, NonFiniteError or FactorizationError as :func:`rmcore.head.fit.fit`.
        """
        if not preferences and ranks is None:
            reject("preferences", "an empty list", "at least one pair")
        config = replace(config or HeadConfig(backbone.hidden_size), **kwargs)
        with working(ranks, "encoding"):
            hidden, labels, pairs = encode_preferences(
                backbone, preferences, config.mode, progress=progress, may_be_empty=ranks is not None
            )
        note = None if progress is None else (lambda _line: progress("fitting", 0, 0))
        head = SNGPHead(config).to(hidden.device)
        frozen, report = fit(head, hidden, labels, pairs=pairs, dtype=dtype, progress=note, ranks=ranks)
        model = cls(backbone, frozen)
        model.critiqued = False
        if error_prior:
            model.error_prior = error_prior_of(frozen.config, preferences, hidden, labels, pairs, ranks=ranks)
        return model, report

    @classmethod
    def upgrade(
        cls,
        backbone: Backbone,
        preferences: Sequence[Preference],
        *,
        ridge: float = 1.0,
        dtype: torch.dtype | None = None,
        error_prior: bool = False,
        progress: Progress | None = None,
        ranks: Ranks | None = None,
    ) -> Self:
        """Make an existing scalar reward model uncertainty-aware: its head is kept as β, only P is fitted.

        ``backbone`` is a published reward model (:meth:`Backbone.from_reward_model`). One that scores pairs is fitted
        in concat mode, each pair in both orders, all others in difference mode. Raises CheckpointError, naming the
        first token that differs, where the first preferences do not become the tokens that the tokenizer's own call
        makes of them.

        ``error_prior`` as in :meth:`fit`: its own scores, with a posterior of the other four fifths of the pairs.
        ``ranks`` as in :meth:`fit` too.
        """
        if not preferences and ranks is None:
            reject("preferences", "an empty list", "at least one pair")
        beta, beta0 = backbone.scalar_head()
        mode: PairMode = "concat" if backbone.pairwise else "difference"
        with working(ranks, "encoding"):
            if not backbone.pairwise:
                require_same_tokens(backbone.encoder, ((p.prompt, p.chosen) for p in preferences[:16]))
            hidden, labels, pairs = encode_preferences(
                backbone, preferences, mode, progress=progress, may_be_empty=ranks is not None
            )
        own: dict[str, Any] = {"mode": mode, "features": "linear", "order_mean": backbone.order_mean}
        config = HeadConfig(backbone.hidden_size, ridge=ridge, **own)

        def fitted(
            rows: Tensor, own_labels: Tensor, own_pairs: Tensor | None, ranks: Ranks | None = None
        ) -> FrozenHead:
            return upgrade(
                rows, own_pairs, beta.to(rows), beta0, labels=own_labels, config=config, dtype=dtype, ranks=ranks
            )

        model = cls(backbone, fitted(hidden, labels, pairs, ranks))
        model.critiqued = False
        if error_prior:
            given = (model.head.config, preferences, hidden, labels, pairs)
            model.error_prior = error_prior_of(*given, fitted=fitted, ranks=ranks)
        return model

    def add_estimator(
        self, name: str, preferences: Sequence[Preference], *, progress: Progress | None = None, **settings: Any
    ) -> PairEstimator:
        """Fit another uncertainty beside the head on training pairs and keep it with the model (difference mode).

        Args:
            name: one of :data:`rmcore.head.estimators.ESTIMATORS`; one of that name is replaced.
            preferences: at least one pair.
            progress: progress callback.
            **settings: of the estimator's ``fit``.

        Raises:
            InputError: a name that there is not, a concat-mode model, no pairs, or what the estimator refuses.
        """
        estimator_named(name)
        if self.head.config.mode != "difference":
            reject("model", "one in concat mode", "one in difference mode, whose pairs share the responses' rows")
        if not preferences:
            reject("preferences", "an empty list", "at least one pair")
        hidden, labels, pairs = encode_preferences(self.backbone, preferences, "difference", progress=progress)
        assert pairs is not None
        self.estimators |= fit_estimators([name], hidden, labels, pairs, self.head.config, **settings)
        return self.estimators[name]
