"""A reward model: a backbone and a head; here it scores.

Beside this file, what it does with texts (:mod:`rmcore.model.reward_model_encoding`), how it is fitted
(:mod:`rmcore.model.reward_model_fitting`) and how it is kept (:mod:`rmcore.model.reward_model_files`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore._base.progress import Progress
from rmcore._base.prompt import Prompt, Response, canonical_groups
from rmcore.head.apart import pairs_apart, rows_apart
from rmcore.head.attributes.scores import AttributeScores
from rmcore.head.estimators import URM, URME, PairEstimator, VarianceKind
from rmcore.head.frozen import FrozenHead, PairScores
from rmcore.model.backbone import Backbone, Deterministic
from rmcore.model.critiques import Critiques, StateCounts, merged_texts, read_critiques
from rmcore.model.error_prior import ErrorPrior
from rmcore.model.model_folder import ModelParts, check_width
from rmcore.model.response_scores import ResponseScores, pair_squares
from rmcore.model.reward_model_encoding import RewardModelEncoding
from rmcore.model.reward_model_files import RewardModelFiles
from rmcore.model.reward_model_fitting import RewardModelFitting
from rmcore.model.signal import fill_unread
from rmcore.model.text import EncodedText, OverlongPolicy, TextLimit
from rmcore.model.training_pairs import encoding_progress
from rmcore.model.uncertainties import estimate_pairs, find_estimator, head_estimate, told_apart
from rmcore.ops.dispatch import Backend
from rmcore.ops.functional import Scores
from rmcore.ops.reference import mean_field_amplitude

__all__ = ["RewardModel"]


class RewardModel(RewardModelEncoding, RewardModelFitting, RewardModelFiles):
    """Prompts and responses in, logits and uncertainties of pairs out.

    Args:
        backbone: makes hidden states.
        head: a frozen head as wide as them.
        error_prior: what is known of the head's errors, for routers that learn (:mod:`rmcore.model.error_prior`).

    Attributes:
        estimators: other uncertainties fitted for the same backbone, by name (:meth:`add_estimator`); saved with it.
        uncertainty: which of them the model is served with where nobody says; None: its head's. Saved with it.
        critiqued: whether its head was fitted behind critiques; None where nobody knows. Saved with it, and to be read
            otherwise is warned of, once.
    """

    error_prior: ErrorPrior | None = None
    uncertainty: str | None = None
    critiqued: bool | None = None

    def __init__(self, backbone: Backbone, head: FrozenHead, error_prior: ErrorPrior | None = None) -> None:
        check_width(head, backbone)
        self.backbone = backbone
        self.head = head if head.device == backbone.device else head.to(backbone.device)
        self.error_prior = error_prior
        self.estimators: dict[str, PairEstimator] = {}

    @property
    def deterministic(self) -> Deterministic | None:
        """``batch`` where bits do not depend on the other groups of a call (:class:`Backbone`)."""
        return self.backbone.deterministic

    # -- scoring -----------------------------------------------------------------------------------------------------

    @overload
    def score(  # type: ignore[overload-overlap]  # a string is a sequence of strings
        self,
        prompts: str,
        responses: Sequence[Response],
        *,
        critiques: Sequence[str | Sequence[str]] | None = None,
        orders: Literal["both", "one"] = "both",
        backend: Backend = "auto",
        max_length: int | None = None,
        overlong: OverlongPolicy | None = None,
        uncertainty: str | None = None,
        variance: VarianceKind | None = None,
        progress: Progress | None = None,
    ) -> ResponseScores: ...
    @overload
    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[Response]],
        *,
        critiques: Critiques | None = None,
        orders: Literal["both", "one"] = "both",
        backend: Backend = "auto",
        max_length: int | None = None,
        overlong: OverlongPolicy | None = None,
        uncertainty: str | None = None,
        variance: VarianceKind | None = None,
        progress: Progress | None = None,
    ) -> list[ResponseScores]: ...
    def score(
        self,
        prompts: str | Sequence[Prompt],
        responses: Sequence[Response] | Sequence[Sequence[Response]],
        *,
        critiques: Critiques | Sequence[str | Sequence[str]] | None = None,
        orders: Literal["both", "one"] = "both",
        backend: Backend = "auto",
        max_length: int | None = None,
        overlong: OverlongPolicy | None = None,
        uncertainty: str | None = None,
        variance: VarianceKind | None = None,
        progress: Progress | None = None,
    ) -> ResponseScores | list[ResponseScores]:
        """Score responses with the model alone: rewards, and a preference and an uncertainty for every pair.

        The same numbers as ``RewardEngine(model).score(...)``, which adds a judge, micro-batches and accounts.

        Args:
            prompts: one prompt a group, each a text or a list of messages; or one text.
            responses: K ≥ 1 responses a prompt, K may differ; or those of the one prompt. Equal responses of a group
                are decided by rule: nothing between them.
            critiques: for each response its critiques, each a text read behind it (:mod:`rmcore.model.critiques`): the
                scores are means over them, and their spread is part of v. In concat mode one at most.
            orders: concat mode: score ``both`` orders of a pair and average, or ``one`` (i < j).
            backend: of the head's kernels.
            max_length: most tokens of a text in this call; None is the backbone's own limit.
            overlong: what happens to longer ones (:data:`~rmcore.model.text.OverlongPolicy`); None is the backbone's.
            uncertainty: whose g, v and p̃: ``head``, or an estimator that the model has (difference mode). None: what
                the model is served with (:attr:`uncertainty`).
            variance: ``epistemic``, ``aleatoric`` or ``total``: which of it u is made of; None: all that it tells by
                itself, which of the head is the epistemic part.
            progress: called with ("encoding", tokens done, tokens in all).

        Returns:
            A :class:`~rmcore.model.ResponseScores` a prompt, in order; for one text as prompt a single one.

        Raises:
            InputError: wrong nesting, nothing to score, or an over-long text under the policy ``error``.
            NonFiniteError: the backbone produced NaN or Inf.
        """
        if isinstance(prompts, str):
            if isinstance(responses, str) or not isinstance(responses, Sequence):
                reject("responses", type(responses).__name__, "a list of responses, since prompts is one text")
            for k, response in enumerate(responses):
                if isinstance(response, (list, tuple)) and response and isinstance(response[0], str):
                    reject(f"responses[{k}]", "a list of texts", "a response, since prompts is one text")
            one: Any = [responses]
            said: Any = None if critiques is None else [critiques]
            return self.score(
                [prompts],
                one,
                critiques=said,
                orders=orders,
                backend=backend,
                max_length=max_length,
                overlong=overlong,
                uncertainty=uncertainty,
                variance=variance,
                progress=progress,
            )[0]
        if orders not in ("both", "one"):
            reject("orders", repr(orders), "'both' or 'one'")
        given: Any = responses
        prompts, groups = canonical_groups(prompts, given)
        limit = self.backbone.text_limit(max_length, overlong)
        read = None if critiques is None else read_critiques(critiques, groups)
        if read is not None and self.mode == "difference":
            own: dict[str, Any] = {"backend": backend, "uncertainty": uncertainty, "variance": variance}
            return self._score_critiqued(prompts, groups, read, limit=limit, progress=progress, **own)
        encoded = self.encode_groups(prompts, groups, orders=orders, limit=limit, critiques=read)
        texts = [text for group in encoded for text in group]
        hidden, attributes = self.backbone.hidden_and_attributes(texts, progress=encoding_progress(progress))
        hidden = fill_unread(hidden, encoded)
        how: dict[str, Any] = {"orders": orders, "backend": backend, "uncertainty": uncertainty, "variance": variance}
        return self.scores_of(hidden, encoded, groups, attributes=attributes, **how)

    def _score_critiqued(
        self,
        prompts: Sequence[Prompt],
        groups: Sequence[Sequence[Response]],
        critiques: Sequence[Sequence[Sequence[str]]],
        *,
        backend: Backend,
        limit: TextLimit,
        uncertainty: str | None,
        variance: VarianceKind | None,
        progress: Progress | None,
    ) -> list[ResponseScores]:
        estimator = self.estimator_named(uncertainty)
        states = StateCounts.of(critiques)
        encoded = self.encode_groups(prompts, groups, limit=limit, critiques=critiques)
        texts = [text for group in encoded for text in group]
        hidden, attributes = self.backbone.hidden_and_attributes(texts, progress=encoding_progress(progress))
        hidden = fill_unread(hidden, encoded)
        noise = None if attributes is None else attributes.score_variance
        own, amplitude = partial(self.head_pairs, backend=backend), mean_field_amplitude()
        if estimator is None and noise is None and variance in (None, "epistemic"):
            found = states.pairs(*own(hidden, states.rows))
            amplitude = self.head.weights.amplitude
        else:
            told = estimate_pairs(self.head, hidden, states.rows, estimator, own, variance=variance, noise=noise)
            found = states.pairs(told.logit, told.variance, told_apart(told))
        scores = self.row_scores(hidden)
        if isinstance(estimator, (URM, URME)):
            scores = estimator.rewards(hidden.cpu())
        merged = [merged_texts(*one) for one in zip(encoded, states.counts, strict=True)]
        return pair_squares(
            found.logit,
            found.variance,
            groups,
            amplitude,
            merged,
            self.mode,
            ordered=False,
            scores=states.mean(scores.cpu()),
            parts={**found.parts, "critique_variance": found.between},
        )

    def scores_of(
        self,
        hidden: Tensor,
        encoded: Sequence[Sequence[EncodedText]],
        responses: Sequence[Sequence[Response]],
        *,
        orders: Literal["both", "one"] = "both",
        backend: Backend = "auto",
        uncertainty: str | None = None,
        variance: VarianceKind | None = None,
        pairs: tuple[Tensor, Tensor] | None = None,
        attributes: AttributeScores | None = None,
    ) -> list[ResponseScores]:
        """:meth:`score` of groups whose hidden rows are at hand.

        Args:
            hidden: (R, h) rows of ``encoded``, finite also where a text was left unread.
            encoded: what :meth:`encode_groups` gave for them and ``orders``.
            responses: the groups' responses.
            orders: as in :meth:`score`.
            backend: of the head's kernels.
            uncertainty: as in :meth:`score`, as is the next.
            variance: which part of it.
            pairs: g and v (Q,) of something else on the same rows, in the order in which the head gives them: pairs
                i < j in difference mode, a value a row in concat mode.
            attributes: of a published reward model that scores several, for all rows.

        Raises:
            InputError: another ``variance`` than the epistemic in concat mode; an unknown ``uncertainty``.
        """
        sizes = torch.tensor([len(group) for group in responses])
        estimator = None if pairs is not None else self.estimator_named(uncertainty)
        shape: dict[str, Any] = {
            "ordered": self.mode == "concat" and orders == "both",
            "mean": self.head.config.order_mean,
            "ranked": self.backbone.ranked and orders == "both",
        }
        scores = self.row_scores(hidden) if self.mode == "difference" else None
        if isinstance(estimator, (URM, URME)):
            scores, attributes = estimator.rewards(hidden.cpu()), estimator.attributes(hidden.cpu())
        if self.mode == "concat" and variance not in (None, "epistemic"):
            reject("variance", repr(variance), "'epistemic' in concat mode, where answers have no spread of their own")
        shape["attributes"] = attributes
        if pairs is not None or (estimator is None and variance in (None, "epistemic")):
            g, v = self.head_pairs(hidden, sizes, backend=backend) if pairs is None else pairs
            told = None
            if attributes is not None and self.mode == "difference" and pairs is None:
                told = head_estimate(self.head, g, v, sizes, attributes.score_variance)
            amplitude = self.head.weights.amplitude
            shape["parts"] = told_apart(told)
            return pair_squares(g, v, responses, amplitude, encoded, self.mode, scores=scores, **shape)
        noise = None if attributes is None else attributes.score_variance
        own = partial(self.head_pairs, backend=backend)
        found = estimate_pairs(self.head, hidden, sizes, estimator, own, variance=variance, noise=noise)
        shape |= {"preference": found.preference, "parts": told_apart(found)}
        amplitude = mean_field_amplitude()
        return pair_squares(*found[:2], responses, amplitude, encoded, self.mode, scores=scores, **shape)

    def estimator_named(self, uncertainty: str | None = None) -> PairEstimator | None:
        """The estimator of a name, or what the model is served with; None for the head itself.

        Raises InputError for one that the model has not, and for any beside the head in concat mode.
        """
        found = find_estimator(uncertainty, self.head, self.estimators, self.uncertainty)
        if found is not None and self.mode != "difference":
            reject("uncertainty", f"{found.name!r} in concat mode", "'head', or a model in difference mode")
        return found

    def head_pairs(self, hidden: Tensor, sizes: Tensor, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
        """The head's g and v (Q,): of all pairs i < j of groups of ``sizes`` rows, or in concat mode of each row."""
        apart = self.deterministic == "batch"
        if self.mode == "difference":
            score_pairs = partial(pairs_apart, self.head) if apart else self.head.score_pairs
            pairs: PairScores | Scores = score_pairs(hidden, sizes, backend=backend)
        else:
            score = partial(rows_apart, self.head) if apart else self.head.score
            pairs = score(hidden, backend=backend)
        return pairs.logit, pairs.variance

    def row_scores(self, hidden: Tensor) -> Tensor:
        """(R,) float64: β·φ + β₀ of each row. Without random features φ is the row, and nothing is rounded."""
        if self.deterministic == "batch" and len(hidden) > 1:
            return torch.cat([self.row_scores(row[None]) for row in hidden])
        if self.head.config.features == "linear" and self.head.config.layer_size is None:
            return (hidden.double() @ self.head.beta + self.head.beta0).cpu()
        return self.head.score(hidden).logit.double().cpu()

    def _parts(self) -> ModelParts:
        if self.uncertainty is not None:
            self.estimator_named()
        return ModelParts(self.backbone, self.head, self.error_prior, self.estimators, self.uncertainty, self.critiqued)
