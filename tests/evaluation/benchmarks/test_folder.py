"""Whole clones: repositories with results, code and tables beside the data, and the hub's snapshots."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from support.benchmarks import ROWS, judgebench, ppe_best_of_k, ppe_pairs, rewardbench2, rm_bench, rmb, written

from rmcore._base.errors import DataError, InputError
from rmcore.evaluation.benchmarks import BENCHMARKS
from rmcore.evaluation.benchmarks.reading import read_items, sources_of


def put(folder: Path, path: str, content: Any) -> Path:
    """A file of JSON rows, one JSON value, or text."""
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    return file


def test_the_whole_repository_of_rmb(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair, pool = rmb()
    put(tmp_path, "RMB_dataset/Pairwise_set/Harmlessness/S1.json", [pair | {"category_path": None}])
    put(tmp_path, "RMB_dataset/BoN_set/Helpfulness/Chat/Casual Conversation.json", [pool | {"category_path": None}])
    scores = {"category_path": "Pairwise_set/Harmlessness/S1", "chosen_reward": 0.2, "reject_reward": 0.1}
    put(tmp_path, "eval/result/ArmoRM-Llama3-8B-v0.1_result.json", [{"pair_uid": "9", "is_correct": 1} | scores])
    put(tmp_path, "eval/scripts/config.json", {"models": ["a"], "batch": {"size": 2}})
    put(tmp_path, "eval/scripts/names.json", ["a", "b"])
    put(tmp_path, "README.md", "# RMB")
    put(tmp_path, "leaderboard.csv", "model,score\n")
    put(tmp_path, ".git/config.json", {"a": 1})
    items = read_items(BENCHMARKS["rmb"], tmp_path)
    assert [item.subset for item in items] == [
        "Helpfulness|best of n|Chat/Casual Conversation",
        "Harmlessness|pairs|S1",
    ]
    assert (
        "left out, no rows of RMB: eval/result/ArmoRM-Llama3-8B-v0.1_result.json, eval/scripts/config.json, "
        "eval/scripts/names.json" in caplog.text
    )
    assert "of a kind that is not read. JSON Lines, JSON and Parquet are: leaderboard.csv" in caplog.text
    assert ".git" not in caplog.text.replace(str(tmp_path), "")


def test_the_whole_repository_of_judgebench(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gpt, claude = ([row | {"response_model": name} for row in judgebench()] for name in ("gpt", "claude"))
    claude = [row | {"question": "blue"} for row in claude]
    put(tmp_path, "data/dataset=judgebench,response_model=gpt-4o-2024-05-13.jsonl", gpt)
    put(tmp_path, "data/dataset=judgebench,response_model=claude-3-5-sonnet-20240620.jsonl", claude)
    said = {"judge_name": "arena_hard", "judgments": [{"decision": "A>B"}, {"decision": "B>A"}]}
    for judge in ("o1-mini", "haiku"):
        put(tmp_path, f"outputs/dataset=judgebench,judge_model={judge}.jsonl", [row | said for row in gpt])
    assert len(read_items(BENCHMARKS["judgebench"], tmp_path)) == 4
    assert "outputs/dataset=judgebench,judge_model=haiku.jsonl, outputs/dataset=judgebench,judge_model" in caplog.text
    assert "stand in several files" not in caplog.text
    caplog.clear()
    assert len(read_items(BENCHMARKS["judgebench"], tmp_path / "outputs")) == 4, "by themselves they are read"
    assert "stand in several files" in caplog.text


def test_the_whole_repository_of_rm_bench(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for row in rm_bench():  # the filtered files name the subset that a row was made from, not the domain
        part = row["domain"]
        put(tmp_path, f"data/{part}_filtered.json", [row | {"domain": None, "subset": "alpacaeval-hard"}])
    put(tmp_path, "data/total_dataset.json", rm_bench())
    put(tmp_path, "allenai_rewardbench/bon_eval/annotations.json", [{"instruction": "a", "output_1": "b"}])
    put(
        tmp_path, "results/chat_scores.json", [rm_bench()[0] | {"score_chosen": [1, 2, 3], "score_rejected": [0, 0, 0]}]
    )
    assert [item.subset for item in read_items(BENCHMARKS["rm-bench"], tmp_path)] == ["chat", "safety-refuse"]
    for name in ("total_dataset.json", "bon_eval/annotations.json", "results/chat_scores.json"):
        assert name in caplog.text
    for path in (tmp_path / "data").glob("*_filtered.json"):
        path.unlink()
    assert len(read_items(BENCHMARKS["rm-bench"], tmp_path)) == 2, "the whole is read where its parts are not there"


def test_all_of_ppe_in_one_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, rows in (("PPE-Human-Preference-V1", ppe_pairs()), ("PPE-GPQA-Best-of-K", ppe_best_of_k())):
        (tmp_path / name / "data").mkdir(parents=True)
        written(tmp_path / name / "data", rows, "parquet", "train-00000-of-00001")
        put(tmp_path, f"{name}/README.md", "# data")
    put(tmp_path, "ppe-result-data/gpqa_best_of_k/ArmoRM.json", [{"question_id": 1, "score_1": [0.5]}])
    pairs = read_items(BENCHMARKS["ppe-pairs"], tmp_path)
    assert [item.subset for item in pairs] == ["human preference"] * 2
    assert "PPE-GPQA-Best-of-K/data/train-00000-of-00001.parquet" in caplog.text
    (pool,) = read_items(BENCHMARKS["ppe-best-of-k"], tmp_path)
    assert (pool.subset, len(pool.responses)) == ("GPQA", 4)


def test_a_snapshot_of_the_hub(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "7ff08853"
    blobs.mkdir()
    (snapshot / "data").mkdir(parents=True)
    for row, shard in zip(rewardbench2(), range(3), strict=True):
        blob = written(blobs, [row], "parquet", f"b{shard}").rename(blobs / f"b{shard}")
        (snapshot / "data" / f"test-{shard:05d}-of-00003.parquet").symlink_to(blob)
    put(snapshot, "README.md", "---\nlicense: odc-by\n---\n")
    put(snapshot, ".gitattributes", "*.parquet filter=lfs\n")
    with caplog.at_level(logging.WARNING):
        assert len(read_items(BENCHMARKS["rewardbench2"], snapshot)) == 3
    assert not caplog.text, "nothing is left out"
    for name in ("rewardbench2", "rewardbench"):  # without git lfs a clone has pointers in place of files
        pointer = put(
            tmp_path, f"clone {name}/data/test-00000-of-00001.parquet", "version https://git-lfs.github.com\n"
        )
        with pytest.raises(DataError, match="a Git LFS pointer"):
            read_items(BENCHMARKS[name], pointer.parent.parent)


def test_a_file_with_a_missing_field_is_an_error_and_not_left_out(tmp_path: Path) -> None:
    for name, rows in ROWS.items():
        lacks = dict(rows()[0])
        prompt = next(column for column in ("prompt", "question", "conversation_input") if column in lacks)
        del lacks[prompt]
        put(tmp_path, f"{name}/a.jsonl", rows())
        put(tmp_path, f"{name}/b.jsonl", [lacks])
        with pytest.raises(DataError, match=rf"b\.jsonl:1: {prompt}: "):
            read_items(BENCHMARKS[name], tmp_path / name)
    broken = put(tmp_path, "judgebench/b.jsonl", judgebench())
    broken.write_text(broken.read_text()[:60])
    with pytest.raises(DataError, match=r"b\.jsonl:1: not JSON"):
        read_items(BENCHMARKS["judgebench"], tmp_path / "judgebench")


def test_a_folder_without_any_row_of_it_says_so(tmp_path: Path) -> None:
    put(tmp_path, "bon_eval/results.json", [{"instruction": "a", "output": "b"}])
    put(tmp_path, "bon_eval/map.json", {"a": 1})
    with pytest.raises(
        InputError, match=r"2 data files, none with chosen or rejected \(bon_eval/map\.json, bon_eval/r"
    ):
        sources_of(BENCHMARKS["rewardbench"], tmp_path)
    put(tmp_path, "bon_eval/empty.jsonl", [])
    put(tmp_path, "rows.jsonl", ROWS["rewardbench"]())
    assert sources_of(BENCHMARKS["rewardbench"], tmp_path) == [
        str(tmp_path / "bon_eval" / "empty.jsonl"),
        str(tmp_path / "rows.jsonl"),
    ]
