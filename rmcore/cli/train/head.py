"""``rmcore train`` on frozen states: encode once, fit, calibrate, learn where the head errs, save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.progress import Progress as Bar

from rmcore._base.prompt import content_key
from rmcore.cli.checks import Kept, save_or_say
from rmcore.cli.console import encoding_progress, notes, training_progress
from rmcore.cli.ranks import totals
from rmcore.cli.train.ai_labels import Mixture, encode_ai, fit_mixture, mix, parse_weight
from rmcore.cli.train.config import RunSettings
from rmcore.cli.train.data import TrainingData, tell_data
from rmcore.cli.train.options import HeadOptions, RecipeOptions

if TYPE_CHECKING:
    from torch import Tensor

    from rmcore.head.config import HeadConfig
    from rmcore.head.fit import FitReport
    from rmcore.head.frozen import FrozenHead
    from rmcore.head.ranks import Ranks
    from rmcore.head.sngp import SNGPHead
    from rmcore.model.backbone import Backbone
    from rmcore.model.error_prior import ErrorPrior
    from rmcore.model.training_pairs import Preference
    from rmcore.model.tune import Trial

__all__ = ["HeadRun", "calibrated_or_told"]


@dataclass(frozen=True)
class States:
    """Encoded pairs, as :func:`rmcore.model.training_pairs.encode_preferences` gives them."""

    hidden: Tensor
    labels: Tensor
    pairs: Tensor | None

    def scored(self, head: FrozenHead) -> tuple[Tensor, Tensor]:
        """Logit and variance of every pair."""
        import torch

        if not len(self.hidden):
            return self.hidden.new_empty(0), self.hidden.new_empty(0)
        if self.pairs is None:
            scores = head.score(self.hidden)
            return scores.logit, scores.variance
        twos = torch.full((len(self.pairs),), 2, dtype=torch.int64)
        found = head.score_pairs(self.hidden[self.pairs.flatten()], twos)
        return found.logit, found.variance


@dataclass(frozen=True)
class Fit:
    """A head that was fitted, by what, and on what."""

    head: FrozenHead
    config: HeadConfig
    report: FitReport
    mixture: Mixture | None
    trials: list[Trial]


@dataclass(frozen=True)
class HeadRun:
    """One run, whose backbone has its final weights.

    Attributes:
        spine: the backbone.
        data: the pairs.
        head: options of the head.
        recipe: what else is asked for.
        settings: of ``--config``.
        ranks: the processes, None for one alone.
        finetuned: the head as the backbone's training left it, None where that was not trained.
    """

    spine: Backbone
    data: TrainingData
    head: HeadOptions
    recipe: RecipeOptions
    settings: RunSettings
    ranks: Ranks | None
    finetuned: SNGPHead | None = None

    def run(self, bar: Bar, out: Path, kept: Kept) -> str:
        """Fit and save; what to say of it."""
        from rmcore.head.ranks import working
        from rmcore.model.reward_model import RewardModel
        from rmcore.model.uncertainties import fit_estimators

        items = self._items()
        states = self._encoded(items, bar)
        fitted = self._fitted(states, items, bar)
        unseen = self._unseen(bar)
        frozen = fitted.head if unseen is None else self._calibrated(fitted.head, unseen)
        prior = self._error_prior(frozen, fitted, items, states, unseen)
        if self.recipe.tune:
            notes.print(_tuned(fitted.config, fitted.trials), markup=False, highlight=False)
        if fitted.mixture is not None and fitted.mixture.report is not None:
            notes.print(fitted.mixture.report.to_markdown(), markup=False, highlight=False)
        model = RewardModel(self.spine, frozen, prior)
        model.critiqued = self.recipe.critiques
        if further := self.recipe.estimators(self.head.mode):
            assert states.pairs is not None
            model.estimators |= fit_estimators(further, states.hidden, states.labels, states.pairs, fitted.config)
            model.uncertainty = further[0]
        how: Literal["name", "embed"] = "embed" if self.finetuned is not None else self.recipe.storing
        if self.ranks is None or self.ranks.rank == 0:
            with working(self.ranks, "saving"):
                save_or_say(out, lambda path: model.save_pretrained(path, backbone=how), kept)
        return self._line(frozen, fitted, states, out)

    def _items(self) -> list[Preference]:
        from rmcore.model.training_pairs import informative

        if not self.data.judged:
            return self.data.items
        # Prompts are needed by pair, so those that teach nothing go first.
        return [self.data.items[k] for k in informative(self.spine, self.data.items, self.head.mode)]

    def _encoded(self, items: Sequence[Preference], bar: Bar) -> States:
        from rmcore.head.ranks import working
        from rmcore.model.training_pairs import encode_preferences

        silent: dict[int, str] = {}
        with working(self.ranks, "encoding"):
            states = States(
                *encode_preferences(
                    self.spine,
                    items,
                    self.head.mode,
                    progress=encoding_progress(bar),
                    may_be_empty=self.ranks is not None,
                    reasons=silent,
                )
            )
        if self.data.report is not None and self.finetuned is None:
            self.data.report.leave_out(silent)
            tell_data(self.data.report, self.settings)
        return states

    def _fitted(self, states: States, items: Sequence[Preference], bar: Bar) -> Fit:
        from rmcore.head.fit import fit
        from rmcore.head.sngp import SNGPHead
        from rmcore.model.ai_weight import EncodedPairs
        from rmcore.model.training import train_layer
        from rmcore.model.tune import tune

        hidden, labels, pairs = states.hidden, states.labels, states.pairs
        config, seed, dtype = self.head.config(self.spine.hidden_size), self.head.seed, self.head.serving_dtype
        trials: list[Trial] = []
        if self.recipe.tune:
            config, trials = tune(config, hidden, labels, pairs, seed=seed, ranks=self.ranks)
        if self.data.judged:
            human = EncodedPairs(hidden, labels, pairs, [content_key(item.prompt) for item in items])
            judged = encode_ai(self.spine, self.data.judged, self.head.mode, encoding_progress(bar))
            mixture = mix(config, human, judged, parse_weight(self.recipe.ai_weight), seed)
            frozen, report = fit_mixture(config, mixture, dtype)
            return Fit(frozen, config, report, mixture, trials)
        head = self.finetuned or SNGPHead(config).to(self.spine.device)
        if self.recipe.epochs:
            watch, _ = training_progress(bar, "training the layer")
            epochs = self.recipe.epochs
            train_layer(head, hidden, labels, pairs=pairs, epochs=epochs, seed=seed, progress=watch, ranks=self.ranks)
        frozen, report = fit(head, hidden, labels, pairs=pairs, dtype=dtype, ranks=self.ranks)
        return Fit(frozen, config, report, None, trials)

    def _unseen(self, bar: Bar) -> States | None:
        from rmcore.head.ranks import working
        from rmcore.model.training_pairs import encode_preferences

        if not self.data.held_out_count:
            return None
        with working(self.ranks, "encoding --calibrate"):
            return States(
                *encode_preferences(
                    self.spine,
                    self.data.held_out,
                    self.head.mode,
                    progress=encoding_progress(bar),
                    may_be_empty=self.ranks is not None,
                )
            )

    def _calibrated(self, frozen: FrozenHead, unseen: States) -> FrozenHead:
        from rmcore.head.fit import fit_amplitude

        calibrated = fit_amplitude(frozen, *unseen.scored(frozen), unseen.labels, ranks=self.ranks)
        return calibrated_or_told(frozen, calibrated, self.data.held_out_count)

    def _error_prior(
        self,
        frozen: FrozenHead,
        fitted: Fit,
        items: Sequence[Preference],
        states: States,
        unseen: States | None,
    ) -> ErrorPrior | None:
        from rmcore.model.error_prior_fit import error_prior_of

        if not self.recipe.error_prior:
            return None
        if not self.recipe.epochs and self.finetuned is None:
            with_ai = None if fitted.mixture is None else fitted.mixture.fitted(fitted.config)
            known = (frozen.config, items, states.hidden, states.labels, states.pairs)
            return error_prior_of(*known, fitted=with_ai, ranks=self.ranks)
        if unseen is None:  # trained layers have seen every pair
            return None
        unknown = (frozen.config, self.data.held_out, unseen.hidden, unseen.labels, unseen.pairs)
        return error_prior_of(*unknown, held_out_of=(frozen, states.hidden), ranks=self.ranks)

    def _line(self, frozen: FrozenHead, fitted: Fit, states: States, out: Path) -> str:
        logit, _ = states.scored(frozen)
        agrees = logit.sign() * (states.labels - 0.5).sign()  # 0 without a preference, which counts half
        decided = states.labels != 0.5
        halves = int((agrees + 1)[decided].sum())
        counts = halves, int(decided.sum()), len(states.labels), self.spine.stats.tokens
        halves, told, rows, tokens = totals(self.ranks, *counts)
        accuracy = f"{50 * halves / told:.1f}%" if told else "not defined, since all labels are ties"
        mixture = fitted.mixture
        beside = "" if mixture is None else f" and {len(mixture.ai)} of a judge at weight {mixture.weight:g}"
        amplitude = f"amplitude {frozen.config.resolved_amplitude:.3g}; " if self.data.held_out_count else ""
        return (
            f"{rows if self.head.mode == 'difference' else rows // 2} pairs{beside}, {tokens} tokens; "
            f"Newton {'converged' if fitted.report.converged else 'stopped'} after {fitted.report.passes} passes; "
            f"training accuracy {accuracy}; {amplitude}wrote {out}"
        )


def calibrated_or_told(frozen: FrozenHead, calibrated: FrozenHead, pairs: int) -> FrozenHead:
    """The calibrated head; the one before, with a word, where that many held-out pairs want no uncertainty at all."""
    if calibrated.config.resolved_amplitude:
        return calibrated
    notes.print(
        f"--calibrate: {pairs} pairs want amplitude 0, which makes u = 1 everywhere and "
        f"leaves routers nothing to go by; it stays {frozen.config.resolved_amplitude:.3g}"
    )
    return frozen


def _tuned(config: HeadConfig, trials: Sequence[Trial]) -> str:
    """What was tried, and what was chosen."""
    lines = ["setting                    value  log-loss  accuracy  (on pairs left out)"]
    for trial in trials:
        value = f"{trial.value:g}" if trial.setting else "–"
        lines.append(f"{trial.setting or 'as given':22s} {value:>9s}  {trial.loss:8.4f}  {100 * trial.accuracy:7.1f}%")
    chosen = ("length_scale_factor", "kernel_scale", "ridge", "num_features")
    return "\n".join([*lines, "chosen: " + ", ".join(f"{name} {getattr(config, name):g}" for name in chosen)])
