"""Labels of recorded judges held against people's: soft ones, judges measured without answers, AI labels beside human.

On LLMBar's recorded verdicts (five judges, five prompts, both orders): a judge's soft label is its share of verdicts
over the five prompts in each order, with one pseudo-vote for either side; Dawid & Skene see votes alone and are then
held against the labels. On PandaLM: GPT-3.5's recorded labels of most pairs beside people's of a few. Needs the data
folder (``--data`` or RMCORE_DATA). Writes ``ai_labels.json``, ``ai_labels.md`` and ``ai_labels.png``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

import rmcore
from rmcore._base.files import write_atomic
from rmcore.cli.run_demo import DEMO_HEAD, demo_backbone
from rmcore.evaluation.ai_labels import LabelReport, label_report, plot_labels
from rmcore.evaluation.ai_weight import AIWeightReport, ai_weight_report
from rmcore.evaluation.judge_quality import JudgeReport, Vote, judge_quality
from rmcore.evaluation.streams import find_data
from rmcore.head import HeadConfig
from rmcore.judge import Verdict
from rmcore.judge.labelling import soft_label
from rmcore.judge.orders import Asked
from rmcore.model.ai_weight import EncodedPairs, held_out_losses
from rmcore.model.data import read_lines
from rmcore.model.training_pairs import Preference, encode_preferences, informative

__all__ = ["ai_weights", "judges_alone", "labels_of", "main"]

JUDGES = ("GPT-4", "PaLM2", "ChatGPT", "LLaMA2", "Falcon")
PROMPTS = ("CoT", "Metrics_Reference", "Swap", "Vanilla", "Vanilla_NoRules")
HUMAN = 100
"""PandaLM pairs with people's labels; the others have the judge's."""


def labels_of(rows: Sequence[dict[str, Any]], judge: str) -> LabelReport:
    """Soft labels of one judge against people's; ``chosen`` counts as the first response."""

    def verdict(row: dict[str, Any], order: str) -> Verdict:
        said = [row["judges"].get(f"{judge}/{prompt}/{order}") for prompt in PROMPTS]
        known = [value for value in said if value is not None]
        return Verdict(2 * (sum(known) + 1) / (len(known) + 2) - 1) if known else Verdict.none("no_record")

    labels = [soft_label(Asked(verdict(row, "ab"), verdict(row, "ba"))) for row in rows]
    return label_report(labels, [row["prompt"] for row in rows], [1.0] * len(rows))


def judges_alone(rows: Sequence[dict[str, Any]], subset: str = "") -> tuple[JudgeReport, dict[str, float]]:
    """What votes alone tell of the judges, and how often each really agrees with people (both orders, ties half).

    ``subset`` takes the rows of one part only. Which response is called first is drawn by row, or the answer would
    always be the same.
    """
    votes: list[Vote] = []
    right: dict[str, list[float]] = {judge: [] for judge in JUDGES}
    for k, row in enumerate(rows):
        if subset not in row["subset"]:
            continue
        turn = 1.0 if k % 2 else -1.0
        for judge in JUDGES:
            orders = []
            for order in ("ab", "ba"):
                said = [row["judges"].get(f"{judge}/{prompt}/{order}") for prompt in PROMPTS]
                known = [2.0 * value - 1 for value in said if value is not None]
                votes += [Vote(str(k), judge, (order == "ab") == (turn > 0), turn * value) for value in known]
                orders += [float(np.mean(known))] if known else []
            if orders:
                right[judge].append(0.5 + 0.5 * float(np.sign(round(float(np.mean(orders)), 12))))
    return judge_quality(votes, replicates=100), {judge: float(np.mean(own)) for judge, own in right.items()}


def ai_weights(folder: Path, human: int, seed: int) -> AIWeightReport:
    """GPT-3.5's labels of PandaLM's pairs beside people's of ``human`` of them."""
    rows = [row for _, row in read_lines(folder / "pandalm.jsonl.gz")]
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    people = [Preference(row["prompt"], row["chosen"], row["rejected"]) for row in (rows[k] for k in order[:human])]
    judged = []
    for row in (rows[k] for k in order[human:]):
        said = row["judges"].get("gpt-3.5-turbo")
        if said is not None:
            better, worse = (row["chosen"], row["rejected"]) if said else (row["rejected"], row["chosen"])
            judged.append(Preference(row["prompt"], better, worse))
    backbone = demo_backbone()
    backbone.use_state_cache()

    def encoded(given: list[Preference]) -> EncodedPairs:
        kept = informative(backbone, given, "difference")
        states = encode_preferences(backbone, [given[k] for k in kept], "difference")
        return EncodedPairs(*states, [str(given[k].prompt) for k in kept])

    own, theirs = encoded(people), encoded(judged)
    config = HeadConfig(backbone.hidden_size, seed=seed, **DEMO_HEAD)
    return ai_weight_report(held_out_losses(config, own, theirs, seed=seed), own.prompts, len(theirs), seed=seed)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rmcore.bench.ai_labels", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", help="the data folder; default RMCORE_DATA")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args(argv)
    folder = find_data(options.data)
    if folder is None:
        print("needs the data folder: --data or RMCORE_DATA", file=sys.stderr)
        return 2
    rows = [row for _, row in read_lines(folder / "llmbar.jsonl.gz")]
    labels = {judge: labels_of(rows, judge) for judge in JUDGES}
    alone = {part or "all": judges_alone(rows, part) for part in ("", "Natural")}
    weights = {count: ai_weights(folder, count, 0) for count in (HUMAN, 400)}
    write_atomic(options.out / "ai_labels.json", json.dumps(_content(labels, alone, weights), indent=1) + "\n")
    write_atomic(options.out / "ai_labels.md", _markdown(labels, alone, weights))
    plot_labels(labels["GPT-4"], options.out / "ai_labels.png")
    return 0


def _content(
    labels: dict[str, LabelReport],
    alone: dict[str, tuple[JudgeReport, dict[str, float]]],
    weights: dict[int, AIWeightReport],
) -> dict[str, Any]:
    return {
        "command": "python -m rmcore.bench.ai_labels",
        "version": rmcore.__version__,
        "soft_labels": {judge: report.to_dict() for judge, report in labels.items()},
        "without_answers": {part: {**told.to_dict(), "agrees_with_people": own} for part, (told, own) in alone.items()},
        "ai_weights": {str(count): report.to_dict() for count, report in weights.items()},
    }


def _markdown(
    labels: dict[str, LabelReport],
    alone: dict[str, tuple[JudgeReport, dict[str, float]]],
    weights: dict[int, AIWeightReport],
) -> str:
    lines = [
        "# Labels of recorded judges",
        "",
        "`python -m rmcore.bench.ai_labels`",
        "",
        "## Soft labels on LLMBar",
        "",
    ]
    for judge, report in labels.items():
        lines += [f"**{judge}.** {report.to_markdown()}"]
    lines += ["![GPT-4's labels](ai_labels.png)", ""]
    for part, (told, own) in alone.items():
        lines += [f"## Judges without answers: LLMBar, {part}", "", told.to_markdown()]
        lines += ["| judge | Dawid & Skene, % | agrees with people, % |", "|---|---|---|"]
        found = {judge.judge: judge.accuracy.point for judge in told.judges if judge.accuracy is not None}
        lines += [f"| {judge} | {100 * found[judge]:.1f} | {100 * own[judge]:.1f} |" for judge in found]
        order = stats.spearmanr([found[judge] for judge in found], [own[judge] for judge in found]).statistic
        lines += ["", f"Rank correlation {order:.2f}.", ""]
    for count, weight in weights.items():
        lines += [f"## GPT-3.5's labels beside {count} of people's (PandaLM)", "", weight.to_markdown()]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
