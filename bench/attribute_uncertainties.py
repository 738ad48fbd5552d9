"""URM and URME on responses that people gave attributes (``topical_chat_usr``), and away from them (``uncertainties``).

Five folds by prompt. On four the heads learn the six attributes (the reward is the mean of ``overall``), the other
estimators the pairs that this attribute makes; on the fifth every estimator's pairs and filters are measured, best of n
by mean and with a penalty, and URME's two measures of disagreement beside those on numeric calculations, which this
program makes up: no such text is in the data (the test of arXiv:2410.00847).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmcore.bench.filters import Run, filter_curves, filter_lines, filter_scores
from rmcore.evaluation.evaluate import PairStates
from rmcore.evaluation.statistics import auroc
from rmcore.evaluation.streams import StreamPair
from rmcore.head.attributes import AttributeEnsemble, EnsembleScores, FitOptions
from rmcore.head.estimators import ESTIMATORS, URM, URME, AnyEstimator, AttributeLabels, PairEstimate
from rmcore.model.backbone import Backbone
from rmcore.model.data import AttributeRow, read_attributes

__all__ = ["NAMES", "attribute_figures", "attribute_lines", "calculations", "read_data"]

NAMES = ("understandability", "naturalness", "coherence", "engagingness", "groundedness", "overall")
MEASURES = ("gap", "covariance")
FOLDS, MEMBERS, PENALTIES = 5, 3, (0.0, 0.5, 1.0, 2.0)
TRAINING = FitOptions(steps=300)
WEIGHTS = (0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
"""The reward is the mean of ``overall``: 550 pairs are too few for a gate as wide as the states."""

Measured = Callable[[AnyEstimator, PairStates, tuple[StreamPair, ...]], tuple[dict[str, Any], Run]]


@dataclass(frozen=True)
class Responses:
    """Encoded responses: rows (N, h), labels (N, A), and for each the number of its prompt."""

    rows: list[AttributeRow]
    hidden: Tensor
    labels: Tensor
    prompt: Tensor

    def of(self, keep: Tensor) -> Responses:
        """Some of them, by a mask."""
        rows = [self.rows[k] for k in keep.nonzero()[:, 0].tolist()]
        return Responses(rows, self.hidden[keep], self.labels[keep], self.prompt[keep])

    def pairs(self) -> tuple[Tensor, Tensor]:
        """(P, 2) pairs i < j of a prompt with different overall, and (P,) whether the first has more."""
        overall, found = self.labels[:, NAMES.index("overall")], []
        for i in range(len(overall)):
            later = ((self.prompt == self.prompt[i]) & (overall != overall[i])).nonzero()[:, 0]
            found += [(i, j) for j in later.tolist() if j > i]
        pairs = torch.tensor(found)
        return pairs, (overall[pairs[:, 0]] > overall[pairs[:, 1]]).float()


def read_data(data: Path, backbone: Backbone) -> Responses:
    """The data, encoded."""
    columns = {name: f"scores.{name}" for name in NAMES}
    rows = list(read_attributes(data / "topical_chat_usr.jsonl.gz", NAMES, columns, limits=(0, 5)))
    known: dict[str, int] = {}
    prompt = torch.tensor([known.setdefault(str(row.prompt), len(known)) for row in rows])
    texts = [backbone.encoder.encode(row.prompt, row.response) for row in rows]
    return Responses(rows, backbone.hidden(texts).cpu(), torch.tensor([row.labels for row in rows]), prompt)


def calculations(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Prompts of sums and products, each with a right or a wrong answer in turn."""
    draw, found = random.Random(seed), []
    for k in range(count):
        a, b, c = (draw.randint(11, 99) for _ in range(3))
        off = 0 if k % 2 == 0 else draw.choice([-10, -1, 1, 10])
        found.append((f"Calculate {a} * {b} + {c}.", f"{a} * {b} + {c} = {a * b} + {c} = {a * b + c + off}"))
    return found


def attribute_figures(
    responses: Responses, numeric: Tensor, measured: Measured, *, replicates: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """All figures, as JSON values.

    Args:
        responses: the data.
        numeric: (N, h) rows of :func:`calculations`.
        measured: gives an estimator's figures on labelled pairs.
        replicates: of bootstraps, clustered by prompt.
        seed: of folds and heads.
    """
    prompts = int(responses.prompt.max()) + 1
    order = torch.randperm(prompts, generator=torch.Generator().manual_seed(seed))
    pooled = _Pool({name: [] for name in ESTIMATORS})
    for fold in range(FOLDS):
        held = torch.isin(responses.prompt, order[fold::FOLDS])
        train, test = responses.of(~held), responses.of(held)
        index, labels = train.pairs()
        for name, kind in ESTIMATORS.items():
            settings: dict[str, Any] = {}
            if issubclass(kind, (URM, URME)):
                said = AttributeLabels(NAMES, train.hidden, train.labels)
                settings = {"attributes": said, "gate": None, "weights": WEIGHTS, "options": TRAINING, "seed": seed}
            estimator = kind.fit(train.hidden, labels, index, **settings)
            pooled.estimators[name].append((estimator, test))
            if isinstance(estimator, URME):
                pooled.add(estimator.ensemble, test, numeric)
    measured_of = {name: _pooled_figures(folds, measured) for name, folds in pooled.estimators.items()}
    runs = {name: run for name, (_, run) in measured_of.items()}
    return {
        "responses": len(responses.rows),
        "prompts": prompts,
        "pairs": len(responses.pairs()[0]),
        "attributes": list(NAMES),
        "members": MEMBERS,
        "folds": FOLDS,
        "estimators": {name: own for name, (own, _) in measured_of.items()},
        "attribute_error": pooled.errors(),
        "filter": {name: filter_curves([run], replicates=replicates, seed=seed) for name, run in runs.items()},
        "best_of": {measure: pooled.best_of(measure, replicates, seed) for measure in MEASURES},
        "numeric": {measure: pooled.away(measure) for measure in MEASURES},
    }


class _ByFold:
    """Estimators of the folds as one: pairs are scored by the one that has not seen them."""

    name, kind = "folds", "total"

    def __init__(self, folds: list[tuple[AnyEstimator, Responses]]) -> None:
        self.folds = folds

    def pairs(self, hidden: Tensor, group_sizes: Tensor) -> PairEstimate:
        found, at = [], 0
        for estimator, test in self.folds:
            count = len(test.pairs()[0])
            found.append(estimator.pairs(hidden[2 * at : 2 * (at + count)], group_sizes[at : at + count]))
            at += count
        pairs = zip(*(one[:-1] for one in found), strict=True)  # measures are of rows
        columns: list[Any] = [None if some[0] is None else torch.cat(some) for some in pairs]
        return PairEstimate(*columns)


def _pooled_figures(folds: list[tuple[AnyEstimator, Responses]], measured: Measured) -> tuple[dict[str, Any], Run]:
    hidden, stream, disputes = [], [], []
    for estimator, test in folds:
        index, labels = test.pairs()
        hidden.append(test.hidden[index])
        stream += [
            StreamPair(str(int(test.prompt[i])), "a", "b", float(y), "topical_chat")
            for i, y in zip(index[:, 0].tolist(), labels.tolist(), strict=True)
        ]
        if isinstance(estimator, URME):
            disputes.append(filter_scores(estimator, PairStates(hidden[-1], torch.ones(len(index), 2))))
    states = PairStates(torch.cat(hidden), torch.ones(len(stream), 2))
    figures, (scores, right, prompt) = measured(_ByFold(folds), states, tuple(stream))  # type: ignore[arg-type]
    own = {name: np.concatenate([one[name] for one in disputes]) for name in (MEASURES if disputes else ())}
    return figures, (scores | own, right, prompt)


class _Pool:
    """What URME said of held-out responses, over the folds."""

    def __init__(self, estimators: dict[str, list[tuple[AnyEstimator, Responses]]]) -> None:
        self.estimators = estimators
        self.test: list[tuple[Responses, EnsembleScores]] = []
        self.numeric: list[EnsembleScores] = []

    def add(self, ensemble: AttributeEnsemble, test: Responses, numeric: Tensor) -> None:
        """A fold."""
        self.test.append((test, ensemble.scores(test.hidden)))
        self.numeric.append(ensemble.scores(numeric))

    def errors(self) -> dict[str, Any]:
        """Root mean square error of each attribute's mean, of its mean label, and the mean σ."""
        found = {}
        for k, name in enumerate(NAMES):
            means = [torch.stack([m.attributes[:, k] for m in said.members]).mean(0) for _, said in self.test]
            stds = [m.attribute_std[:, k] for _, s in self.test for m in s.members if m.attribute_std is not None]
            label = torch.cat([test.labels[:, k] for test, _ in self.test]).double()
            error = float((torch.cat(means) - label).square().mean().sqrt())
            found[name] = {"rmse": round(error, 4), "label_sd": round(float(label.std()), 4)}
            found[name]["sigma"] = round(float(torch.cat(stds).square().mean().sqrt()), 4)
        return found

    def best_of(self, measure: Any, replicates: int, seed: int) -> dict[str, Any]:
        """The overall label of the response chosen of each prompt, less the mean over its responses."""
        found: dict[str, Any] = {}
        for penalty in PENALTIES:
            gain = []
            for test, said in self.test:
                score = said.penalised(penalty, measure)
                overall = test.labels[:, NAMES.index("overall")]
                for prompt in test.prompt.unique():
                    own = (test.prompt == prompt).nonzero()[:, 0]
                    gain.append(float(overall[own[score[own].argmax()]] - overall[own].mean()))
            low, high = _bounds(np.array(gain), np.arange(len(gain)), replicates, seed)
            found[f"{penalty:g}"] = {"gain": float(np.mean(gain)), "low": low, "high": high}
        return found

    def away(self, measure: Any) -> dict[str, float]:
        """A measure on held-out responses and on calculations, and how well it tells the two."""
        near = torch.cat([said.uncertainty(measure) for _, said in self.test])
        far = torch.cat([said.uncertainty(measure) for said in self.numeric])
        return {
            "held_out": float(near.mean()),
            "numeric": float(far.mean()),
            "auroc": float(auroc(torch.cat([near, far]).numpy(), np.r_[np.zeros(len(near)), np.ones(len(far))])),
        }


def _bounds(values: np.ndarray, cluster: np.ndarray, replicates: int, seed: int) -> tuple[float, float]:
    """95% percentile bounds of a mean, prompts resampled."""
    draw = np.random.default_rng(seed)
    where = np.unique(cluster, return_inverse=True)[1]
    total, count = np.bincount(where, values), np.bincount(where)
    chosen = draw.integers(len(count), size=(replicates, len(count)))
    means = total[chosen].sum(1) / count[chosen].sum(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def attribute_lines(figures: dict[str, Any]) -> list[str]:
    """The figures as lines of Markdown."""
    about = (
        f"{figures['responses']} responses to {figures['prompts']} prompts, {figures['pairs']} pairs, "
        f"{figures['folds']} folds by prompt"
    )
    lines = [f"### Attributes (Topical-Chat, USR), {about}", ""]
    lines += ["| | accuracy, % | log-loss | ECE | Brier | AUROC of errors by v / margin | AURC, % |", "|---" * 7 + "|"]
    for name, own in figures["estimators"].items():
        point, low, high = own["accuracy"]
        lines.append(
            f"| {name} | {point:.1f} [{low:.1f}, {high:.1f}] | {own['log_loss']:.3f} | {own['ece']:.3f} | "
            f"{own['brier']:.3f} | {own['auroc_by_variance']:.3f} / {own['auroc_by_margin']:.3f} | {own['aurc']:.1f} |"
        )
    lines += ["", *filter_lines(figures["filter"]), "", f"### URME of {figures['members']} heads"]
    lines += [
        "",
        "| best of 6, penalty λ | by mean − λ·gap: overall above the mean | by mean − λ·‖Σ‖ |",
        "|---" * 3 + "|",
    ]
    for penalty in figures["best_of"]["gap"]:
        cells = [penalty]
        for measure in MEASURES:
            own = figures["best_of"][measure][penalty]
            cells.append(f"{own['gain']:+.2f} [{own['low']:+.2f}, {own['high']:+.2f}]")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| numeric calculations | held-out responses | calculations | AUROC |", "|---" * 4 + "|"]
    for measure in MEASURES:
        own = figures["numeric"][measure]
        lines.append(f"| {measure} | {own['held_out']:.2f} | {own['numeric']:.2f} | {own['auroc']:.3f} |")
    return lines
