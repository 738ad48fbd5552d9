"""Rows with all that the published files have beside what is read: other columns, nulls, numbers as ids, messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.benchmarks import ROWS, written

from rmcore._base.errors import DataError
from rmcore.evaluation.benchmarks import BENCHMARKS
from rmcore.evaluation.benchmarks.item import Item
from rmcore.evaluation.benchmarks.reading import read_items

SAID = 'Ünïcode 你好 🦜\u2028 and "quotes"\n\n```py\nx = 1\n```'


def rewardbench() -> list[dict[str, Any]]:
    row = {"prompt": "Human: what?", "chosen": "Human: what? \n\nAssistant: x", "rejected": "Human: what?"}
    models = {"chosen_model": "GPT-4", "rejected_model": None}
    return [
        {**row, **models, "subset": "alpacaeval-easy", "id": 0},
        {"prompt": SAID, "chosen": SAID, "rejected": "", **models, "subset": "donotanswer", "id": None},
    ]


def rewardbench2() -> list[dict[str, Any]]:
    about = {"category": "x", "correct": None, "instruction_id_list": ["a", "b"], "method": "m"}
    more = {"num_incorrect": 3, "models": ["a", "b", "c", "d"], "additional_metadata": about}
    one = {"id": "a-1", "prompt": SAID, "chosen": ["yes"], "rejected": ["no", "", SAID], "num_correct": 1}
    tied = {"id": "tied:17", "prompt": "name a colour", "chosen": ["red", "red", "blue"], "rejected": ["dog"]}
    return [
        {**one, "total_completions": 4, "subset": "Precise IF", **more},
        {**tied, "num_correct": 3, "total_completions": 4, "subset": "Ties", **more, "additional_metadata": None},
    ]


def rm_bench() -> list[dict[str, Any]]:
    texts = {"prompt": SAID, "chosen": ["a", "aa", SAID], "rejected": ["b", "", "**b**"], "error": "wrong year"}
    return [{"id": 38, **texts, "domain": "safety-refuse"}, {"id": 39, **texts, "domain": "code"}]


def judgebench() -> list[dict[str, Any]]:
    ids = {"pair_id": "e302b0a0-28d5", "original_id": 1420, "response_model": "gpt-4o-2024-05-13"}
    texts = {"question": SAID, "response_A": "KKKKK", "response_B": ""}
    return [{**ids, "source": "livebench-reasoning", **texts, "label": "B>A"}]


def ppe_pairs() -> list[dict[str, Any]]:
    about = {"turn": 1, "conv_metadata": {"turns": 1, "bold_count_a": {"**": 0}}, "dedup_tag": None, "judge": "arena"}
    row = {"question_id": "q", "model_a": "x", "model_b": "y", "language": None, "prompt": SAID, **about}
    answers = {"response_1": "a", "response_2": SAID, "is_code": True, "length_a": 3}
    return [{**row, **answers, "winner": word} for word in ("model_a", "tie", "tie (bothbad)", "model_b")]


def ppe_best_of_k() -> list[dict[str, Any]]:
    answers = {f"response_{k}": f"answer {k % 3}" for k in range(1, 33)}
    row = {"question_id": 17, "prompt": SAID, "model_name": None, "ground_truth": "B", "mean_score": 0.5, **answers}
    row |= {"parsed_outputs": ["A"] * 31 + [None], "response_1_tokens": 4, "benchmark": "mmlu_pro_best_of_k"}
    mixed = {"scores": [k % 2 for k in range(32)], "sampled_conflict_pairs": [[0, 1], [3, 2], [0, 1]]}
    return [row | mixed, row | {"scores": [1] * 32, "sampled_conflict_pairs": []}]


def rmb() -> list[dict[str, Any]]:
    turns = [("user", "hi"), ("assistant", ""), ("user", SAID)]
    talk = [{"content": said, "language": "English", "role": role} for role, said in turns]
    best, worst = ({"llm_name": name, "answer": name, "score": 5.0} for name in ("good", "bad"))
    pair = {"pair_uid": "15089", "conversation_input": talk, "chosen": best, "reject": worst}
    pool = {"bon_uid": "1679", "conversation_input": talk, "bon_best": best, "loser_list": [worst, best]}
    return [
        pair | {"category_path": "Pairwise_set/Harmlessness/S1"},
        pool | {"category_path": "BoN_set/Helpfulness/Role Playing/General Character"},
    ]


FORMS = (rewardbench, rewardbench2, rm_bench, judgebench, ppe_pairs, ppe_best_of_k, rmb)
FOUND = dict(zip(ROWS, FORMS, strict=True))


def read(folder: Path, name: str, container: str = "jsonl", **change: Any) -> tuple[Item, ...]:
    columns = dict.fromkeys(column for row in FOUND[name]() for column in row)  # in a table each row has them all
    rows = [columns | row | change for row in FOUND[name]()]
    return read_items(BENCHMARKS[name], written(folder, rows, container, name))


def test_published_rows_are_read_in_every_container(tmp_path: Path) -> None:
    counts = {"judgebench": 1}
    for name in ROWS:
        found = [read(tmp_path, name, c) for c in ("jsonl", "json", "jsonl.gz", "parquet")]
        assert len(found[0]) == counts.get(name, 2), name
        assert all(items == found[0] for items in found[1:]), name


def test_no_character_of_a_row_is_lost(tmp_path: Path) -> None:
    first, second = read(tmp_path, "rewardbench")
    assert first.responses == ("Human: what? \n\nAssistant: x", "Human: what?"), "text stays as it is"
    assert (first.id, second.id, second.responses) == ("0", "2", (SAID, ""))
    talk, pool = read(tmp_path, "rmb")
    assert talk.prompt == pool.prompt
    assert [message["role"] for message in talk.prompt] == ["user", "assistant", "user"]  # type: ignore[index]
    assert talk.prompt[2] == {"role": "user", "content": SAID}, "without what is known about the message"
    assert (talk.subset, pool.subset) == (
        "Harmlessness|pairs|S1",
        "Helpfulness|best of n|Role Playing/General Character",
    )
    mixed, right = read(tmp_path, "ppe-best-of-k")
    assert (mixed.id, mixed.subset, mixed.pairs, right.pairs) == ("17", "MMLU-Pro", ((1, 0), (3, 2), (1, 0)), ())
    (judged,) = read(tmp_path, "judgebench")
    assert (judged.prompt, judged.responses, judged.pairs) == (SAID, ("KKKKK", ""), ((1, 0),))


def test_prompts_and_responses_may_be_messages(tmp_path: Path) -> None:
    prompt, answer = [{"role": "user", "content": "red"}], {"role": "assistant", "content": "yes"}
    for name in ("rewardbench", "rewardbench2", "rm-bench", "ppe-pairs", "ppe-best-of-k", "rmb"):
        column = "conversation_input" if name == "rmb" else "prompt"
        assert read(tmp_path, name, **{column: prompt})[0].prompt == prompt, name
        with pytest.raises(DataError, match=rf"{name}\.jsonl:1: {column}\[0\]: got str"):
            read(tmp_path, name, **{column: ["red"]})
    for whole in ([answer], [*prompt, answer]):
        item = read(tmp_path, "rewardbench", prompt=prompt, chosen=whole, rejected=[*whole[:-1], answer])[0]
        assert (item.prompt, item.responses) == (prompt, ("yes", "yes"))
    shapes = read(tmp_path, "rm-bench", chosen=["a", answer, [answer]])
    assert shapes[0].responses[:3] == ("a", "yes", "yes")
    with pytest.raises(DataError, match=r"1: chosen\[2\]\.role: got None"):
        read(tmp_path, "rm-bench", chosen=["a", "b", {"content": "c"}])


def test_a_clone_of_the_hub_is_read_as_its_authors_read_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path, rewardbench(), "parquet", "filtered-00000-of-00001-b2d1")
    written(tmp_path, rewardbench() * 2, "parquet", "raw-00000-of-00001-a1c0")
    (tmp_path / "dataset_infos.json").write_text('{"default": {"description": ""}}')
    assert len(read_items(BENCHMARKS["rewardbench"], tmp_path)) == 2
    assert (
        "left out, the files beside hold its rows. By themselves they are read: raw-00000-of-00001-a1c0" in caplog.text
    )
    (tmp_path / "filtered-00000-of-00001-b2d1.parquet").unlink()
    assert len(read_items(BENCHMARKS["rewardbench"], tmp_path)) == 4


def test_rows_that_several_files_have_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("data", "outputs"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, judgebench(), "jsonl", "response_model=gpt-4o")
    assert len(read_items(BENCHMARKS["judgebench"], tmp_path)) == 2
    assert "1 rows stand in several files and count as often; first" in caplog.text
    caplog.clear()
    written(tmp_path, judgebench() * 2, "jsonl")
    read_items(BENCHMARKS["judgebench"], tmp_path / "data.jsonl")
    assert not caplog.text, "twice in one file is the benchmark's own affair"
