"""Rows in the form in which each benchmark is published, the containers that they come in, and scores of items."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmcore.evaluation.benchmarks.item import Benchmark, CountedPairs, Item
from rmcore.evaluation.benchmarks.scoring import score_lines

GOOD, BAD = "good clear right", "bad vague wrong"


def rewardbench() -> list[dict[str, Any]]:
    text = {"prompt": "red tree", "chosen": GOOD, "rejected": BAD, "chosen_model": "a", "rejected_model": "b"}
    return [text | {"subset": "math-prm", "id": 7}, text | {"subset": "hep-go", "id": 8}]


def rewardbench2() -> list[dict[str, Any]]:
    one = {"prompt": "red", "chosen": [GOOD], "rejected": [BAD, "odd lazy", "rude"], "num_correct": 1}
    ref = one | {"rejected": [BAD], "subset": "Ties", "id": "ref:3", "total_completions": 2}
    tied = ref | {"chosen": [GOOD, "kind exact"], "num_correct": 2, "id": "tied:3", "total_completions": 3}
    return [one | {"subset": "Precise IF", "id": "12", "total_completions": 4}, ref, tied]


def rm_bench() -> list[dict[str, Any]]:
    styles = {
        "chosen": [GOOD, f"{GOOD} kind", f"{GOOD} kind exact"],
        "rejected": [BAD, f"{BAD} odd", f"{BAD} odd rude"],
    }
    return [{"id": f"{d}/1", "prompt": "red", "domain": d, **styles} for d in ("chat", "safety-refuse")]


def judgebench() -> list[dict[str, Any]]:
    row = {"original_id": "1", "question": "red", "response_model": "m", "response_A": GOOD, "response_B": BAD}
    return [
        row | {"pair_id": "u1", "source": "mmlu-pro-law", "label": "A>B"},
        row | {"pair_id": "u2", "source": "livecodebench", "response_A": BAD, "response_B": GOOD, "label": "B>A"},
    ]


def ppe_pairs() -> list[dict[str, Any]]:
    row = {"question_id": "q", "model_a": "x", "model_b": "y", "language": "English", "prompt": "red"}
    return [
        row | {"response_1": one, "response_2": two, "winner": winner}
        for one, two, winner in ((GOOD, BAD, "model_a"), (BAD, GOOD, "model_b"), (GOOD, BAD, "tie (bothbad)"))
    ]


def ppe_best_of_k() -> list[dict[str, Any]]:
    answers = {"response_1": BAD, "response_2": GOOD, "response_3": "odd", "response_4": "kind"}
    row = {"question_id": "q", "model_name": "m", "prompt": "red", "benchmark": "gpqa_best_of_k", **answers}
    return [row | {"scores": [False, True, False, True], "sampled_conflict_pairs": [[0, 1], [3, 2]]}]


def rmb() -> list[dict[str, Any]]:
    row = {
        "conversation_input": [{"role": "user", "content": "red"}],
        "category_path": "RMB/Helpfulness/Chat/Talk.json",
    }
    best, worst = {"llm_name": "a", "answer": GOOD}, {"llm_name": "b", "answer": BAD}
    return [
        row
        | {"pair_uid": "p1", "chosen": best, "reject": worst, "bon_best": None, "loser_list": None, "bon_uid": None},
        row | {"bon_uid": "b1", "bon_best": best, "loser_list": [worst, worst | {"answer": "odd"}], "pair_uid": None},
    ]


ROWS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "rewardbench": rewardbench,
    "rewardbench2": rewardbench2,
    "rm-bench": rm_bench,
    "judgebench": judgebench,
    "ppe-pairs": ppe_pairs,
    "ppe-best-of-k": ppe_best_of_k,
    "rmb": rmb,
}


def written(folder: Path, rows: Sequence[dict[str, Any]], container: str, name: str = "data") -> Path:
    """The rows as a file: jsonl, json, jsonl.gz, jsonl.zst or parquet."""
    path = folder / f"{name}.{container}"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if container == "parquet":
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        parquet.write_table(arrow.Table.from_pylist(list(rows)), path)
    elif container == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif container.endswith(".zst"):
        import pyarrow as arrow

        with arrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(lines)
    else:
        path.write_bytes(gzip.compress(lines) if container.endswith(".gz") else lines)
    return path


def item(quality: Sequence[float], subset: str, own: str = "1", prompt: str = "p") -> Item:
    """An item whose responses are worth this; they are their own numbers."""
    return Item(own, prompt, tuple(map(str, range(len(quality)))), tuple(map(float, quality)), subset)


def scored(
    benchmark: Benchmark, items: Sequence[Item], scores: Sequence[Sequence[float]], **options: Any
) -> dict[str, float]:
    """Score names → scores, from each response's own score."""
    own = [np.array(row, dtype=float) for row in scores]
    margin = np.array([s[i] - s[j] for s, each in zip(own, items, strict=True) for i, j in each.pairs], dtype=float)
    lines = score_lines(benchmark, CountedPairs(tuple(items)), margin, own, replicates=0, **options)
    return {line.name: line.score for line in lines}
