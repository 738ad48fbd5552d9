"""LLMBar as RewardBench's Chat Hard: what accuracy how many calls of a real judge buy, routed and at random.

LLMBar's 419 pairs are five of the six subsets of Chat Hard, with the same counts (mt-bench-hard is missing), and the
data folder has GPT-4's verdicts on them, in both orders. They are written as the benchmark and the verdicts are
published, and read back by the command's own readers. The head is the demo's, fitted on Auto-J. Needs the data folder
(``--data`` or RMCORE_DATA). Writes ``benchmark_routing.json``, ``.md`` and ``.png``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, get_args

import torch

import rmcore
from rmcore._base.arguments import whole
from rmcore._base.files import write_atomic
from rmcore.cli.run_demo import DEMO_HEAD, demo_backbone
from rmcore.evaluation.benchmarks import find_benchmark
from rmcore.evaluation.benchmarks.plot import plot_routing_table
from rmcore.evaluation.benchmarks.reading import read_items
from rmcore.evaluation.benchmarks.report import BenchmarkReport
from rmcore.evaluation.benchmarks.routing import RouteBy, label_verdicts, recorded_verdicts, routing_table
from rmcore.evaluation.benchmarks.routing_table import RoutingTable
from rmcore.evaluation.benchmarks.scoring import benchmark_report, score_items
from rmcore.evaluation.streams import find_data, load_corpus
from rmcore.head import HeadConfig
from rmcore.judge.recorded import RecordedJudge
from rmcore.model.data import read_lines
from rmcore.model.reward_model import RewardModel

__all__ = ["main", "run", "write_llmbar"]

BUDGETS = (0.02, 0.10, 0.25, 0.45)
JUDGE = "GPT-4/Vanilla"
SUBSETS = {
    "Natural": "llmbar-natural",
    "Adversarial/Neighbor": "llmbar-adver-neighbor",
    "Adversarial/GPTInst": "llmbar-adver-GPTInst",
    "Adversarial/GPTOut": "llmbar-adver-GPTOut",
    "Adversarial/Manual": "llmbar-adver-manual",
}
"""LLMBar's parts → RewardBench's names of them."""


def write_llmbar(data: Path, folder: Path) -> tuple[Path, Path]:
    """LLMBar as rows of RewardBench, and GPT-4's verdicts as recorded verdicts; → the two files."""
    rows, verdicts = [], []
    for _, row in read_lines(data / "llmbar.jsonl.gz"):
        pair = {name: row[name] for name in ("prompt", "chosen", "rejected")}
        rows.append(pair | {"subset": SUBSETS[row["subset"]], "id": row["id"]})
        for order in ("ab", "ba"):
            verdict = {1: "win", 0: "loss", None: None}[row["judges"][f"{JUDGE}/{order}"]]
            shown = {"prompt": row["prompt"], "first": row["chosen"], "second": row["rejected"]}
            verdicts.append(shown | {"verdict": verdict, "order": order})
    files = folder / "rewardbench.jsonl", folder / "verdicts.jsonl"
    for file, lines in zip(files, (rows, verdicts), strict=True):
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return files


def run(data: Path, seed: int) -> tuple[BenchmarkReport, list[RoutingTable]]:
    """The model's report, and a table for each routing score, GPT-4 judging, then one with the label."""
    backbone = demo_backbone()
    backbone.use_state_cache()
    config = HeadConfig(backbone.hidden_size, seed=seed, **DEMO_HEAD)
    model, _ = RewardModel.fit(backbone, load_corpus(data).train, config, dtype=torch.float16)
    benchmark = find_benchmark("rewardbench")
    with tempfile.TemporaryDirectory() as folder:
        rows, verdicts = write_llmbar(data, Path(folder))
        items, judge = read_items(benchmark, rows), RecordedJudge.from_file(verdicts)
    answers = score_items(model, items)
    name = "all-MiniLM-L6-v2, fitted on Auto-J"
    sources = ["LLMBar as RewardBench's Chat Hard"]
    report = benchmark_report(benchmark, answers, model=name, mode=model.mode, sources=sources, seed=seed)
    said = recorded_verdicts(answers.pairs, judge, f"{JUDGE}, recorded, both orders")
    title = "LLMBar as RewardBench's Chat Hard"
    tables = [
        routing_table(benchmark, answers, said, by=by, budgets=BUDGETS, prior=model.error_prior, seed=seed)
        for by in get_args(RouteBy)
    ]
    tables.append(routing_table(benchmark, answers, label_verdicts(answers.pairs), budgets=BUDGETS, seed=seed))
    return report, [replace(table, title=title) for table in tables]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="data folder; default: RMCORE_DATA")
    parser.add_argument("--seed", type=whole(least=0), default=0)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args(argv)
    data = find_data(arguments.data)
    if data is None:
        print(
            "benchmark_routing: no data folder; give --data or set RMCORE_DATA. Nothing was measured.", file=sys.stderr
        )
        return 2
    report, tables = run(data, arguments.seed)
    figures: dict[str, Any] = {
        "rmcore": rmcore.__version__,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "head": DEMO_HEAD,
        "report": report.to_dict(),
        "tables": [table.to_dict() for table in tables],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.out / "benchmark_routing.json", json.dumps(figures, indent=2, allow_nan=False) + "\n")
    text = "\n".join([report.to_markdown(), *(table.to_markdown() for table in tables)])
    write_atomic(arguments.out / "benchmark_routing.md", text)
    plot_routing_table(tables[0], arguments.out / "benchmark_routing.png")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
