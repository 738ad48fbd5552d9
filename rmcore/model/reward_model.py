"""A reward model: a backbone and a head, fitted from preferences, saved and loaded as one folder."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from rmcore._base.errors import InputError, reject
from rmcore._base.files import atomic_folder
from rmcore._base.progress import Progress
from rmcore._base.prompt import Prompt, Response, canonical_groups
from rmcore.head import checkpoint
from rmcore.head.apart import pairs_apart, rows_apart
from rmcore.head.attributes.scores import AttributeScores
from rmcore.head.config import HeadConfig, PairMode
from rmcore.head.estimators import URM, URME, PairEstimator, VarianceKind, estimator_named
from rmcore.head.fit import FitReport, fit, upgrade, without_posterior
from rmcore.head.frozen import FrozenHead, PairScores
from rmcore.head.ranks import Ranks, working
from rmcore.head.sngp import SNGPHead
from rmcore.model import hub
from rmcore.model.agreement import require_same_tokens
from rmcore.model.backbone import Backbone, Deterministic
from rmcore.model.critiques import (
    Critiques,
    StateCounts,
    behind_critique,
    critiqued_texts,
    merged_texts,
    read_critiques,
)
from rmcore.model.encoding.tree_attention import Packing
from rmcore.model.encoding_stats import EncodingStats
from rmcore.model.error_prior import ErrorPrior
from rmcore.model.error_prior_fit import error_prior_of
from rmcore.model.folder_files import BASE, folder_digests
from rmcore.model.model_folder import ModelParts, check_width, read_model, write_model
from rmcore.model.response_scores import ResponseScores, pair_squares
from rmcore.model.signal import fill_unread
from rmcore.model.text import EncodedText, OverlongPolicy, TextLimit
from rmcore.model.training_pairs import Preference, encode_preferences, encoding_progress
from rmcore.model.uncertainties import estimate_pairs, find_estimator, fit_estimators, head_estimate, told_apart
from rmcore.ops.dispatch import Backend
from rmcore.ops.functional import Scores
from rmcore.ops.reference import mean_field_amplitude

__all__ = ["RewardModel"]

log = logging.getLogger(__name__)


class RewardModel:
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
        self._warned_of_critiques = False

    def notice_critiques(self, read: bool) -> None:
        """Warn, once, where the head was fitted behind critiques and reads none, or the other way round."""
        if self.critiqued is None or self.critiqued == read or self._warned_of_critiques:
            return
        self._warned_of_critiques = True
        told = ("behind critiques", "without them") if self.critiqued else ("without critiques", "behind them")
        log.warning("the head was fitted %s and is asked %s: its states are not those it was fitted on", *told)

    @property
    def mode(self) -> str:
        """``difference`` or ``concat``."""
        return self.head.config.mode

    @property
    def deterministic(self) -> Deterministic | None:
        """``batch`` where bits do not depend on the other groups of a call (:class:`Backbone`)."""
        return self.backbone.deterministic

    # -- fitting -----------------------------------------------------------------------------------------------------

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
    ) -> tuple[RewardModel, FitReport]:
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
    ) -> RewardModel:
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

    @classmethod
    def as_published(cls, backbone: Backbone) -> RewardModel:
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
        if self.mode != "difference":
            reject("model", "one in concat mode", "one in difference mode, whose pairs share the responses' rows")
        if not preferences:
            reject("preferences", "an empty list", "at least one pair")
        hidden, labels, pairs = encode_preferences(self.backbone, preferences, "difference", progress=progress)
        assert pairs is not None
        self.estimators |= fit_estimators([name], hidden, labels, pairs, self.head.config, **settings)
        return self.estimators[name]

    def row_scores(self, hidden: Tensor) -> Tensor:
        """(R,) float64: β·φ + β₀ of each row. Without random features φ is the row, and nothing is rounded."""
        if self.deterministic == "batch" and len(hidden) > 1:
            return torch.cat([self.row_scores(row[None]) for row in hidden])
        if self.head.config.features == "linear" and self.head.config.layer_size is None:
            return (hidden.double() @ self.head.beta + self.head.beta0).cpu()
        return self.head.score(hidden).logit.double().cpu()

    # -- encoding ----------------------------------------------------------------------------------------------------

    def encode_group(
        self,
        prompt: Prompt,
        responses: Sequence[Response],
        *,
        orders: Literal["both", "one"] = "both",
        limit: TextLimit | None = None,
        compared: Callable[[int], Tensor] | None = None,
        critiques: Sequence[Sequence[str]] | None = None,
    ) -> list[EncodedText]:
        """The backbone inputs of one group: K responses, or the ordered pairs (i, j) row-major (i < j for ``one``).

        With ``critiques`` each response is there once for each of its own; in concat mode it has one at most, which
        stands behind it in every text (:func:`~rmcore.model.critiques.behind_critique`). ``compared`` gives for K
        the pairs (P, 2), i < j, that are wanted; None are all.
        """
        encode = self.backbone.encoder.encode
        if critiques is not None and self.mode == "difference":
            return critiqued_texts(self.backbone.encoder, prompt, responses, critiques, limit)
        if critiques is not None:
            behind = zip(responses, critiques, strict=True)
            responses = [behind_critique(*one, f"critiques[{k}]") for k, one in enumerate(behind)]
        if self.mode == "difference":
            return [encode(prompt, response, limit=limit) for response in responses]
        wanted = None if compared is None else {(i, j) for i, j in compared(len(responses)).tolist()}
        return [
            encode(prompt, a, b, limit=limit)
            for i, a in enumerate(responses)
            for j, b in enumerate(responses)
            if (i != j if orders == "both" else i < j) and (wanted is None or (min(i, j), max(i, j)) in wanted)
        ]

    def encode_groups(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[Response]],
        *,
        orders: Literal["both", "one"] = "both",
        limit: TextLimit | None = None,
        compared: Callable[[int], Tensor] | None = None,
        critiques: Sequence[Sequence[Sequence[str]]] | None = None,
    ) -> list[list[EncodedText]]:
        """:meth:`encode_group` of every group. An InputError names the group by its place among ``prompts``."""
        encode = self.encode_group if compared is None else partial(self.encode_group, compared=compared)
        self.notice_critiques(critiques is not None)
        groups = []
        for k, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
            own: dict[str, Any] = {} if critiques is None else {"critiques": critiques[k]}
            try:
                groups.append(encode(prompt, group, orders=orders, limit=limit, **own))
            except InputError as error:
                raise InputError(f"group {k}: {error}") from error
        return groups

    def hidden_rows(
        self,
        groups: Sequence[Sequence[EncodedText]],
        *,
        progress: Progress | None = None,
        stats: EncodingStats | None = None,
    ) -> Tensor:
        """Hidden rows of encoded groups, in the order ``RewardEngine.score_hidden`` takes them.

        What texts have in common at their beginning is computed once where the backbone allows it (a prompt, each first
        response, a system prompt of all groups): the more groups a call has, the more there is to share.

        Args:
            groups: some or all of what :meth:`encode_groups` returned.
            progress: called with ("encoding", tokens done, tokens in all) after each forward pass.
            stats: what this call did is added to it, besides to the backbone's own running counts.
        """
        return self.backbone.hidden(
            [t for group in groups for t in group], progress=encoding_progress(progress), stats=stats
        )

    def hidden_rows_and_attributes(
        self,
        groups: Sequence[Sequence[EncodedText]],
        *,
        progress: Progress | None = None,
        stats: EncodingStats | None = None,
    ) -> tuple[Tensor, AttributeScores | None]:
        """:meth:`hidden_rows`, and of the same passes the attributes of a published model that scores several."""
        texts = [t for group in groups for t in group]
        return self.backbone.hidden_and_attributes(texts, progress=encoding_progress(progress), stats=stats)

    @property
    def tells_attributes(self) -> bool:
        """Whether the body is a published model of several attributes whose spread is known (difference mode)."""
        return self.mode == "difference" and self.backbone.tells_spread

    def hidden_states(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[Response]],
        *,
        orders: Literal["both", "one"] = "both",
        progress: Progress | None = None,
    ) -> Tensor:
        """:meth:`encode_groups` and :meth:`hidden_rows` in one."""
        return self.hidden_rows(self.encode_groups(prompts, responses, orders=orders), progress=progress)

    # -- saving ------------------------------------------------------------------------------------------------------

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

    def _parts(self) -> ModelParts:
        if self.uncertainty is not None:
            self.estimator_named()
        return ModelParts(self.backbone, self.head, self.error_prior, self.estimators, self.uncertainty, self.critiqued)

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
    ) -> RewardModel:
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
