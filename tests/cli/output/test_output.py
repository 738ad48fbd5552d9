"""What commands write: whole files or none, nothing destroyed, gone on with after an interrupt, UTF-8 everywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cli_output import call, groups, ids
from support.warm import MODEL, WarmPython

from rmcore._base.errors import InputError
from rmcore.cli.output import check_file, json_line, opened_output

# -- lines -----------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(), st.text(st.characters(exclude_categories=()))))
def test_any_text_is_a_line_of_utf8_and_comes_back(record: dict[str, str]) -> None:
    line = json_line(record).encode()
    assert line.count(b"\n") == 1
    # Two halves that stand together are one character to every reader of JSON.
    whole = {
        key: text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass") for key, text in record.items()
    }
    assert json.loads(line) == whole


# -- nothing is destroyed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["score"], ["best-of"], ["filter", "--max-u", "9"]])
def test_output_over_the_input_is_refused_by_any_name(command: list[str], model: Path, tmp_path: Path) -> None:
    source = groups(tmp_path / "g.jsonl", 2)
    text = source.read_text()
    link, hard = tmp_path / "link", tmp_path / "hard"
    link.symlink_to(source)
    os.link(source, hard)
    for out in (source, link, hard, tmp_path / "x" / ".." / "g.jsonl"):
        for more in ([], ["--overwrite"], ["--resume"]):
            result = call(command[0], model, source, *command[1:], "-o", out, *more)
            assert result.exit_code == 2
            assert "which is read" in result.stderr
    assert source.read_text() == text
    assert {path.name for path in tmp_path.iterdir()} == {"g.jsonl", "link", "hard"}


@pytest.mark.parametrize("option", ["--accounts", "--router-state", "--store"])
def test_files_kept_beside_are_not_the_input_either(option: str, model: Path, tmp_path: Path) -> None:
    source = groups(tmp_path / "g.jsonl", 1)
    text = source.read_text()
    result = call("score", model, source, option, source)
    assert result.exit_code == 2
    assert option in result.stderr
    assert source.read_text() == text


def test_nothing_is_written_into_a_folder_that_is_read(model: Path, backbone_path: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in model.iterdir()}
    link = tmp_path / "link"
    link.symlink_to(model)
    for out in (model / "rmcore.json", model / "new.jsonl", link / "head.safetensors", model / ".." / model.name / "x"):
        result = call("score", model, groups(tmp_path / "g.jsonl", 1), "-o", out, "--overwrite")
        assert result.exit_code == 2
        assert "expected a place outside the folder" in " ".join(result.stderr.split())
    assert {file: file.read_bytes() for file in model.iterdir()} == before
    whole = tmp_path / "whole"
    shutil.copytree(model, whole)
    rows = whole / "prefs.jsonl"
    rows.write_text("{}\n")
    result = call("train", rows, "--backbone", backbone_path, "-o", whole, "--overwrite")
    assert result.exit_code == 2
    assert "expected another folder than that of" in " ".join(result.stderr.split())
    assert rows.exists()


def test_names_that_no_file_can_have_are_refused_first(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name in ("x" * 300, "x" * 250, "a\0b", "loop/x", "folder/"):
        with pytest.raises(InputError, match=r"^--out: got "):
            check_file(f"{tmp_path}/{name}")


def test_what_a_run_leaves_is_no_input_either(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected another place"):
        check_file(str(tmp_path / "a"), inputs=[tmp_path / "a.partial"])


def test_resume_is_named_only_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    for resumable in (True, False):
        with pytest.raises(InputError) as caught:
            check_file(str(tmp_path / "a"), resumable=resumable)
        assert ("--resume" in str(caught.value)) is resumable


def test_redirected_onto_itself(model: Path, tmp_path: Path, warm_python: WarmPython) -> None:
    source = groups(tmp_path / "g.jsonl", 1)
    with source.open() as read, source.open("a") as written:
        done = warm_python.start(
            "", "score", model, "-", module="rmcore.cli", modules=MODEL, stdin=read, stdout=written
        )
    _, errors = done.communicate()
    assert done.returncode == 2
    assert "which is read" in errors
    assert ids(source) == [0]


def test_an_existing_result_stays_unless_overwrite_says_so(model: Path, tmp_path: Path) -> None:
    source, out = groups(tmp_path / "g.jsonl", 2), tmp_path / "out.jsonl"
    out.write_text("dear\n")
    for read in (source, tmp_path / "typo.jsonl"):
        result = call("score", model, read, "-o", out)
        assert result.exit_code == 2
        assert "--overwrite replaces it" in result.stderr
    typo = call("score", model, tmp_path / "typo.jsonl", "-o", out, "--overwrite")
    assert typo.exit_code == 2
    assert out.read_text() == "dear\n"
    assert not (tmp_path / "out.jsonl.partial").exists()
    assert call("score", model, source, "-o", out, "--overwrite").exit_code == 0
    assert ids(out) == [0, 1]
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_a_models_folder_is_replaced_only_by_overwrite(model: Path, backbone_path: Path, tmp_path: Path) -> None:
    prefs = model.parent / "prefs.jsonl"
    names = ["--columns", "prompt=question,chosen=good,rejected=bad"]
    before = (model / "rmcore.json").read_bytes()
    options = [*names, "--backbone", backbone_path, "--features", 32]
    result = call("train", prefs, *options, "-o", model)
    assert result.exit_code == 2
    assert "--overwrite replaces it" in result.stderr
    assert (model / "rmcore.json").read_bytes() == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    for out, said in ((foreign, "one that rmcore wrote"), (backbone_path, "which is read")):
        result = call("train", tmp_path / "never read.jsonl", *options, "-o", out, "--overwrite")
        assert result.exit_code == 2
        assert said in result.stderr
    assert call("train", prefs, *options, "-o", tmp_path / "m").exit_code == 0
    assert call("train", prefs, *options, "-o", tmp_path / "m", "--overwrite").exit_code == 0


def test_evaluate_keeps_an_older_report(model: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("dear")
    result = call("evaluate", model, model.parent / "prefs.jsonl", "-o", tmp_path)
    assert result.exit_code == 2
    assert "report.json', which exists" in result.stderr
    assert (tmp_path / "report.json").read_text() == "dear"


# -- encodings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["score"], ["best-of"], ["filter", "--max-u", "9"]])
def test_half_a_surrogate_pair_kills_no_command(command: list[str], model: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "g.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"id":"a","prompt":"hi","responses":["good","bad"]}\n'
        '{"id":"\\ud83d","prompt":"hi \\udc00","responses":["good \\ud83d","bad"]}\n'
        '{"id":"c","prompt":"hi","responses":["kind","rude"]}\n'
    )
    for more in ([], ["-o", out]):
        result = call(command[0], model, source, *command[1:], *more)
        assert result.exit_code == 0, result.stderr
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [record["id"] for record in records] == ["a", "\ud83d", "c"]
    if command[0] == "filter":
        assert records[1]["responses"] == ["good \ud83d", "bad"]


# The command, with a model whose hidden states are made up: what a real one imports takes seconds a process.
FILTER = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from support.models import TableModel, _hand_head
from rmcore.cli import main
from rmcore.model import RewardModel

RewardModel.from_pretrained = lambda *_, **__: TableModel(_hand_head([1.0]), lambda _, text: [float(len(text))])
main()
"""


@pytest.mark.parametrize("locale", ["C", "latin-1"])
def test_bytes_are_utf8_in_every_locale(model: Path, locale: str) -> None:
    stdin = (
        b"\xef\xbb\xbf" + (json_line({"id": "é\ud83d", "prompt": "κ", "responses": ["good ☃", "bad ü"]}) * 2).encode()
    )
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    if locale == "latin-1":
        environment["PYTHONIOENCODING"] = "latin-1:strict"
    done = subprocess.run(
        [sys.executable, "-c", FILTER, "filter", str(model), "-", "--max-u", "999"],
        input=stdin,
        capture_output=True,
        timeout=120,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.decode("utf-8").splitlines()]
    assert [record["responses"] for record in records] == [["good ☃", "bad ü"]] * 2
    assert records[0]["id"] == "é\ud83d"


# -- columns ---------------------------------------------------------------------------------------------------------


def test_columns_take_all_that_follow(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "q.jsonl"
    source.write_text(json_line({"q": "red tree", "name": "n", "meta": {"answers": ["good", "bad"]}}))
    forms = (
        ["--columns", "prompt=q", "responses=meta.answers", "id=name"],
        ["--columns", "prompt=q", "--columns", "responses=meta.answers,id=name"],
        ["--columns=prompt=q,responses=meta.answers,id=name"],
    )
    for form in forms:
        for arguments in ([model, source, *form], [*form, model, source]):
            result = call("score", *arguments)
            assert result.exit_code == 0, result.stderr
            assert json.loads(result.stdout)["id"] == "n"
    for form, said in ((["promt=q"], "expected one of"), (["prompt=question"], "no column 'question'")):
        result = call("score", model, source, "--columns", *form)
        assert result.exit_code == 2
        assert said in result.stderr


def test_margins_are_told_once_where_a_command_reads_them(model: Path, tmp_path: Path, warm_python: WarmPython) -> None:
    prefs = tmp_path / "p.jsonl"
    row = {"prompt": "red tree", "chosen": "good", "rejected": "bad", "margin": 2.5}
    prefs.write_text(json_line(row) * 3)
    done = warm_python.start("", "evaluate", model, prefs, "--replicates", 5, module="rmcore.cli", modules=MODEL)
    _, errors = done.communicate()
    assert done.returncode == 0, errors
    assert errors.count("the column margin is not used") == 1


def test_a_parquet_file_has_the_rows_that_lines_would_have(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"id": k, "rewards": [0.5, None][: 1 + k % 2], "decisions": [{"by": "head", "note": None}] * (k % 3)}
            for k in range(2300)]  # fmt: skip
    rows[2200]["decisions"] = [{"by": "judge", "note": "late"}]  # what no row before has a type for
    with opened_output(str(tmp_path / "out.parquet")) as output:
        for row in rows:
            output.write(row)
        assert json.loads((tmp_path / "out.parquet.partial").read_bytes().partition(b"\n")[0]) == rows[0]
    assert parquet.read_table(tmp_path / "out.parquet").to_pylist() == rows
    assert not (tmp_path / "out.parquet.partial").exists()
    with opened_output(str(tmp_path / "none.parquet")):
        pass
    assert parquet.read_table(tmp_path / "none.parquet").num_rows == 0
