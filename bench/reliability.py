"""What reliability weights do to advantages on recorded data: do they point more the way that people's ratings do?

UARM (arXiv:2606.19818) weighs advantages by 1/(1 + variance/τ). Nothing is trained here: of each response the advantage
that an estimator gives is held against the advantage of the human rating, A* = rating less its group's mean of the
others, by their cosine over all responses, Σ w A A* / (‖w A‖ ‖A*‖): of two gradients made of the same scores the one
with the higher cosine has the larger share in the right direction. Groups of six: Topical-Chat's ratings, five folds by
prompt. Pairs, K = 2: the streams of ``uncertainties``, A* = ±1. τ is a quantile of the variances, so that it means the
same for every estimator; weights of the same sizes on other responses (shuffled) are the control. Intervals are of a
bootstrap over prompts, of the difference to unweighted advantages.

Needs the data folder (``--data`` or RMCORE_DATA). Writes ``reliability.json`` and ``reliability.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rmcore
from rmcore._base.files import write_atomic
from rmcore.bench.attribute_uncertainties import FOLDS, NAMES, TRAINING, WEIGHTS, Responses, read_data
from rmcore.bench.uncertainties import fit_estimator, load_streams
from rmcore.cli.run_demo import demo_backbone
from rmcore.engine.advantage import reliability_weights, rloo_advantages, rloo_variance
from rmcore.evaluation.evaluate import encode_pairs
from rmcore.evaluation.streams import find_data
from rmcore.head.estimators import ESTIMATORS, URM, URME, AnyEstimator, AttributeLabels, SNGPWithURM
from rmcore.model.training_pairs import encode_preferences
from rmcore.ops.reference import mean_field_amplitude, uncertainty

__all__ = ["advantages_of", "cosines", "main", "run"]

TAUS = (0.25, 0.5, 0.75)
"""Quantiles of the variances of the advantages."""


def advantages_of(estimator: AnyEstimator, hidden: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(R,) RLOO advantages of groups of ``size`` rows, and their variance, as an engine's ``GroupScores`` has them."""
    groups = len(hidden) // size
    found = estimator.pairs(hidden, torch.full((groups,), size, dtype=torch.int64))
    i, j = torch.triu_indices(size, size, 1)
    u = uncertainty(found.variance, mean_field_amplitude())

    def squares(column: Tensor, sign: int) -> Tensor:
        square = torch.zeros(groups, size, size, dtype=torch.float64)
        square[:, i, j] = column.view(groups, -1)
        square[:, j, i] = sign * column.view(groups, -1)
        return square

    preference = squares(found.preference, -1)
    variance = rloo_variance(squares(found.variance, 1), squares(1 / u, 1))
    return rloo_advantages(preference).flatten(), variance.flatten()


def cosines(
    advantage: np.ndarray, variance: np.ndarray, truth: np.ndarray, prompt: np.ndarray, replicates: int, seed: int = 0
) -> dict[str, Any]:
    """The cosine without weights, and for each τ what weights and the same weights shuffled add to it."""
    rng = np.random.default_rng(seed)
    number = np.unique(prompt, return_inverse=True)[1]
    count = int(number.max()) + 1
    times = rng.multinomial(count, np.full(count, 1 / count), size=replicates)[:, number]

    def cosine(weight: np.ndarray) -> tuple[float, np.ndarray]:
        a = weight * advantage
        parts = np.stack([a * truth, a * a, truth * truth], 1)
        each = np.concatenate([parts.sum(0)[None], times @ parts])
        found = each[:, 0] / np.sqrt(each[:, 1] * each[:, 2])
        return float(found[0]), found[1:]

    plain, drawn = cosine(np.ones_like(advantage))
    result: dict[str, Any] = {"responses": len(advantage), "prompts": count, "unweighted": round(plain, 4), "tau": {}}
    for level in TAUS:
        tau = float(np.quantile(variance, level))
        if tau <= 0:
            continue
        weight = reliability_weights(torch.from_numpy(variance), tau).numpy()
        own, of = cosine(weight)
        low, high = np.quantile(of - drawn, [0.025, 0.975])
        shuffled = np.mean([cosine(rng.permutation(weight))[0] for _ in range(20)])
        gain = {"gain": own - plain, "low": low, "high": high, "shuffled": shuffled - plain}
        result["tau"][f"{level:g}"] = {name: round(float(value), 4) for name, value in gain.items()}
    return result


def _groups(responses: Responses, seed: int = 0) -> dict[str, tuple[np.ndarray, ...]]:
    """By estimator: advantages, variances, the ratings' advantages and prompts of Topical-Chat's responses."""
    order = torch.randperm(int(responses.prompt.max()) + 1, generator=torch.Generator().manual_seed(seed))
    found: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in ESTIMATORS}
    for fold in range(FOLDS):
        held = torch.isin(responses.prompt, order[fold::FOLDS])
        train, test = responses.of(~held), responses.of(held)
        by_prompt = test.prompt.argsort(stable=True)
        size = int(torch.bincount(test.prompt[by_prompt]).max())
        hidden, rating = test.hidden[by_prompt], test.labels[by_prompt, NAMES.index("overall")].double()
        rating = rating.view(-1, size)
        truth = (rating - (rating.sum(1, keepdim=True) - rating) / (size - 1)).flatten()
        index, labels = train.pairs()
        for name, kind in ESTIMATORS.items():
            settings: dict[str, Any] = {}
            if issubclass(kind, (URM, URME, SNGPWithURM)):
                said = AttributeLabels(NAMES, train.hidden, train.labels)
                settings = {"attributes": said, "gate": None, "weights": WEIGHTS, "options": TRAINING, "seed": seed}
            estimator = kind.fit(train.hidden, labels, index, **settings)
            a, v = advantages_of(estimator, hidden, size)
            found[name].append((a.numpy(), v.numpy(), truth.numpy(), test.prompt[by_prompt].numpy()))
    return {name: tuple(map(np.concatenate, zip(*parts, strict=True))) for name, parts in found.items()}


def run(data: Path, replicates: int = 1000) -> dict[str, Any]:
    """All figures, as JSON values."""
    corpus, backbone = load_streams(data), demo_backbone()
    backbone.use_state_cache()
    hidden, labels, pairs = encode_preferences(backbone, corpus.train, "difference")
    assert pairs is not None
    fitted = {name: fit_estimator(name, hidden, labels, pairs, 0) for name in ESTIMATORS}
    parts: dict[str, dict[str, Any]] = {}
    for stream in corpus.streams(0):
        rows = encode_pairs(backbone, stream.pairs, "difference").hidden.flatten(0, 1)
        sign = np.array([2 * pair.label - 1 for pair in stream.pairs])
        truth = np.stack([sign, -sign], 1).flatten()
        prompt = np.repeat([str(pair.prompt) for pair in stream.pairs], 2)
        parts[stream.title] = {}
        for name, estimator in fitted.items():
            a, v = advantages_of(estimator, rows, 2)
            parts[stream.title][name] = cosines(a.numpy(), v.numpy(), truth, prompt, replicates)
    parts["Topical-Chat, groups of 6"] = {
        name: cosines(a, v, truth, prompt, replicates)
        for name, (a, v, truth, prompt) in _groups(read_data(data, backbone)).items()
    }
    return {"rmcore": rmcore.__version__, "date": date.today().isoformat(), "replicates": replicates, "parts": parts}


def table(figures: dict[str, Any]) -> str:
    """As Markdown: a row an estimator and part, gains in hundredths of the cosine."""
    heads = ["", "cosine, unweighted", *(f"τ at {100 * level:.0f}%" for level in TAUS), "shuffled, τ at 50%"]
    lines = ["Gains of the cosine by weights, in hundredths, with 95% bounds.", ""]
    for part, estimators in figures["parts"].items():
        lines += [f"### {part}", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for name, own in estimators.items():
            cells = [name, f"{own['unweighted']:.3f}"]
            for level in TAUS:
                gain = own["tau"].get(f"{level:g}")
                shown = "" if gain is None else "{gain:+.1f} [{low:+.1f}, {high:+.1f}]"
                cells.append(shown.format(**{k: 100 * v for k, v in (gain or {}).items()}))
            middle = own["tau"].get("0.5")
            cells.append("" if middle is None else f"{100 * middle['shuffled']:+.1f}")
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="data folder; default: RMCORE_DATA")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args(argv)
    data = find_data(arguments.data)
    if data is None:
        print("reliability: no data folder; give --data or set RMCORE_DATA. Nothing was measured.", file=sys.stderr)
        return 2
    figures = run(data)
    write_atomic(arguments.out / "reliability.json", json.dumps(figures, indent=1, allow_nan=False) + "\n")
    write_atomic(arguments.out / "reliability.md", table(figures))
    print(table(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
