"""Files in each benchmark's published form, in every container; what is wrong in a row is named with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.benchmarks import BAD, GOOD, ROWS, rm_bench, rmb, written

from rmcore._base.errors import DataError, InputError
from rmcore.evaluation.benchmarks import BENCHMARKS
from rmcore.evaluation.benchmarks.reading import read_items, sources_of

CONTAINERS = ("jsonl", "json", "jsonl.gz", "jsonl.zst", "parquet")


def test_every_form_in_every_container(tmp_path: Path) -> None:
    assert set(ROWS) == set(BENCHMARKS)
    for name, rows in ROWS.items():
        found = [read_items(BENCHMARKS[name], written(tmp_path, rows(), c, name)) for c in CONTAINERS]
        assert all(items == found[0] for items in found[1:]), name
        for item in found[0]:
            assert item.pairs
            assert all(item.quality[i] > item.quality[j] for i, j in item.pairs)


def test_what_a_row_becomes(tmp_path: Path) -> None:
    def of(name: str) -> Any:
        return read_items(BENCHMARKS[name], written(tmp_path, ROWS[name](), "jsonl", name))

    first, second = of("rewardbench")
    assert (first.id, first.subset, first.responses, first.quality) == ("7", "math-prm", (GOOD, BAD), (1.0, 0.0))
    assert first.cluster == second.cluster, "one prompt"
    precise, ref, tied = of("rewardbench2")
    assert (precise.subset, len(precise.responses), precise.pairs) == ("Precise IF", 4, ((0, 1), (0, 2), (0, 3)))
    assert (tied.pairs, ref.cluster) == (((0, 2), (1, 2)), tied.cluster)
    assert [item.subset for item in of("rm-bench")] == ["chat", "safety-refuse"]
    assert of("rm-bench")[0].pairs[:4] == ((0, 3), (0, 4), (0, 5), (1, 3))
    assert [(item.subset, item.pairs) for item in of("judgebench")] == [
        ("mmlu-pro-law", ((0, 1),)),
        ("livecodebench", ((1, 0),)),
    ]
    assert [item.pairs for item in of("ppe-pairs")] == [((0, 1),), ((1, 0),)], "the tie is left out"
    (pool,) = of("ppe-best-of-k")
    assert (pool.subset, pool.pairs, pool.quality) == ("GPQA", ((1, 0), (3, 2)), (0.0, 1.0, 0.0, 1.0))
    pair, best = of("rmb")
    assert (pair.subset, pair.prompt[0]["content"]) == ("Helpfulness|pairs|Chat/Talk", "red")
    assert (best.subset, best.responses) == ("Helpfulness|best of n|Chat/Talk", (GOOD, BAD, "odd"))


def test_ties_in_labels_are_counted_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_items(BENCHMARKS["ppe-pairs"], written(tmp_path, ROWS["ppe-pairs"](), "jsonl"))
    assert "1 ties in the labels are left out" in caplog.text


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("rewardbench", {"chosen": None}, "chosen: missing"),
    ("rewardbench", {"subset": "alpaca"}, "subset: got 'alpaca', expected one of alpacaeval-easy"),
    ("rewardbench", {"subset": None}, "subset: missing"),
    ("rewardbench2", {"chosen": "text"}, "chosen: got str, expected a list of texts"),
    ("rewardbench2", {"rejected": [BAD, None]}, r"rejected\[1\]: got NoneType, expected a text"),
    ("rewardbench2", {"num_correct": 2}, "num_correct: got 2, expected 1"),
    ("rewardbench2", {"chosen": [GOOD, GOOD], "num_correct": 2, "total_completions": 5}, "chosen: got 2 responses"),
    ("rewardbench2", {"subset": "Ties"}, "id: got '12', expected ref:NUMBER or tied:NUMBER"),
    ("rm-bench", {"chosen": [GOOD, GOOD]}, "chosen: got 2 texts, expected 3"),
    ("rm-bench", {"domain": "poetry"}, "domain: got 'poetry'"),
    ("rm-bench", {"domain": None}, "domain: got none, and none in the file's name"),
    ("judgebench", {"label": "A=B"}, "label: got 'A=B', expected one of A>B, B>A"),
    ("judgebench", {"source": "gpqa"}, "source: got 'gpqa'"),
    ("judgebench", {"question": 3}, "question: got int, expected a text"),
    ("ppe-pairs", {"winner": "model_c"}, "winner: got 'model_c'"),
    ("ppe-best-of-k", {"scores": [True]}, "scores: got 1 values, expected a list of 4"),
    ("ppe-best-of-k", {"scores": [True, 2, 0, 0]}, r"scores\[1\]: got 2"),
    ("ppe-best-of-k", {"sampled_conflict_pairs": [[0, 2]]}, r"sampled_conflict_pairs\[0\]: got \[0, 2\]"),
    ("ppe-best-of-k", {"sampled_conflict_pairs": [[0, 9]]}, r"sampled_conflict_pairs\[0\]: got \[0, 9\]"),
    ("ppe-best-of-k", {"response_3": None}, "response_3: missing"),
    ("ppe-best-of-k", {"benchmark": None}, "benchmark: got none"),
    ("rmb", {"chosen": {"llm_name": "a"}}, "chosen.answer: got NoneType"),
    ("rmb", {"reject": None}, "reject: missing"),
    ("rmb", {"category_path": "other"}, "goal: got"),
    ("rmb", {"conversation_input": None}, "conversation_input: missing"),
]


def test_a_wrong_field_is_named_with_its_row(tmp_path: Path) -> None:
    for k, (name, change, told) in enumerate(WRONG):
        rows = ROWS[name]()
        rows.insert(1, rows[0] | change)
        with pytest.raises(DataError, match=told) as caught:
            read_items(BENCHMARKS[name], written(tmp_path, rows, "jsonl", f"f{k}"))
        assert str(caught.value).startswith(f"{tmp_path / f'f{k}.jsonl'}:2: ")
    rows = rm_bench()
    rows[1]["prompt"] = None
    with pytest.raises(DataError, match=r"x\.parquet, row 2: prompt: missing"):
        read_items(BENCHMARKS["rm-bench"], written(tmp_path, rows, "parquet", "x"))


def test_a_folder_is_all_its_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for row in rm_bench():
        own = dict(row)
        written(tmp_path, [own | {"domain": None}], "json", f"{own['domain']}_filtered")
    written(tmp_path, rm_bench(), "json", "total_dataset")
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / ".cache").mkdir()
    written(tmp_path / ".cache", rm_bench(), "json")
    items = read_items(BENCHMARKS["rm-bench"], tmp_path)
    assert [item.subset for item in items] == ["chat", "safety-refuse"]
    assert "left out, the files beside hold its rows. By themselves they are read: total_dataset.json" in caplog.text
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="without data files"):
        read_items(BENCHMARKS["rm-bench"], empty)


def test_rmb_is_told_by_its_folders(tmp_path: Path) -> None:
    folder = tmp_path / "BoN_set" / "Harmlessness"
    folder.mkdir(parents=True)
    written(folder, [row | {"category_path": None} for row in rmb()[1:]], "json", "S1")
    (item,) = read_items(BENCHMARKS["rmb"], tmp_path)
    assert item.subset == "Harmlessness|best of n|S1"


def test_where_rows_come_from(tmp_path: Path) -> None:
    assert sources_of(BENCHMARKS["judgebench"]) == ["hf://ScalerLab/JudgeBench:gpt", "hf://ScalerLab/JudgeBench:claude"]
    assert sources_of(BENCHMARKS["judgebench"], "me/mine:test") == ["hf://me/mine:test"]
    assert sources_of(BENCHMARKS["judgebench"], "hf://me/mine") == ["hf://me/mine"]
    assert sources_of(BENCHMARKS["judgebench"], "some/file.jsonl") == ["some/file.jsonl"]
    with pytest.raises(InputError, match="--data: got none, expected a file or folder: RMB is not on the hub"):
        sources_of(BENCHMARKS["rmb"])
    with pytest.raises(DataError, match=r"some/file\.jsonl: No such file"):
        read_items(BENCHMARKS["judgebench"], "some/file.jsonl")
    tie = [row for row in ROWS["ppe-pairs"]() if row["winner"].startswith("tie")]
    with pytest.raises(InputError, match="0 rows without a pair to compare"):
        read_items(BENCHMARKS["ppe-pairs"], written(tmp_path, tie, "jsonl"))
