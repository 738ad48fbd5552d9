"""What commands write: whole files or none, nothing destroyed, gone on with after an interrupt, UTF-8 everywhere."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.warm import MODEL, WarmPython
from typer.testing import CliRunner, Result

from rmcore._base.errors import InputError, RmcoreError
from rmcore.cli import app
from rmcore.cli.output import check_file, json_line, opened_output

runner = CliRunner()
ROW = {"prompt": "red tree house", "responses": ["good clear", "bad rude", "odd vague"]}


def call(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return runner.invoke(app, [str(a) for a in arguments], input=stdin, catch_exceptions=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, backbone_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("output")
    rows = [
        {"question": "red tree", "good": f"{good} {word}", "bad": f"{bad} {word}"}
        for good, bad in (("good", "bad"), ("clear", "vague"), ("kind", "rude"))
        for word in ("red", "blue", "green", "tree")
    ]
    (folder / "prefs.jsonl").write_text("".join(json_line(row) for row in rows))
    result = call(
        "train", folder / "prefs.jsonl", "--columns", "prompt=question", "chosen=good", "rejected=bad", "--backbone",
        backbone_path, "--pooling", "mean", "--features", 64, "-o", folder / "model",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    return folder / "model"


def groups(path: Path, count: int, **more: Any) -> Path:
    path.write_text("".join(json_line({**ROW, "id": k, **more}) for k in range(count)))
    return path


def ids(path: Path) -> list[Any]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


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


# -- interrupted and gone on with ------------------------------------------------------------------------------------


def test_evaluate_tells_accuracy_by_subset_and_by_row(model: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "red tree", "chosen": ["good red"], "rejected": ["bad red", "rude blue"], "subset": "Focus"},
        {"prompt": "blue tree", "chosen": ["bad red"], "rejected": ["good red", "rude red"], "subset": "Math|x"},
        {"prompt": "green", "chosen": ["kind red", "good red"], "rejected": ["bad red"], "subset": "Focus"},
    ]
    (tmp_path / "rb2.jsonl").write_text("".join(json_line(row) for row in rows))
    result = call("evaluate", model, tmp_path / "rb2.jsonl", "-o", tmp_path / "out", "--replicates", 5)
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "out" / "report.json").read_text())["subsets"]
    assert [(part["name"], part["n_pairs"], part["n_rows"], part["row_accuracy"]) for part in found] == [
        ("Focus", 4, 2, 1.0),
        ("Math|x", 2, 1, 0.0),
        ("all", 6, 3, pytest.approx(2 / 3)),
    ]
    assert "all of a row right" in result.stdout
    plain = groups(tmp_path / "plain.jsonl", 0)
    plain.write_text(json_line({"prompt": "red", "chosen": "good red", "rejected": "bad red"}) * 3)
    result = call("evaluate", model, plain, "--replicates", 5)
    assert result.exit_code == 0, result.stderr
    assert "subset" not in result.stdout
    plain.write_text(json_line({"prompt": "red", "chosen": "good red", "rejected": "bad red", "label": 0.75}) * 3)
    result = call("evaluate", model, plain, "--replicates", 5)
    assert result.exit_code == 0, result.stderr
    assert "3 of 3 labels are between 0.5 and 1" in " ".join(result.stderr.split())


def test_evaluate_with_an_overlong_response(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "red", "chosen": f"good{more}", "rejected": "bad"} for more in (" good" * 50, "")]
    (tmp_path / "p.jsonl").write_text("".join(json_line(row) for row in rows))
    arguments = ("evaluate", model, tmp_path / "p.jsonl", "--replicates", 5, "--max-length", 20)
    refused = call(*arguments)
    assert refused.exit_code == 2
    assert "pairs[0]" in refused.stderr
    unread = call(*arguments, "--overlong", "no-reward")
    assert unread.exit_code == 0, unread.stderr
    assert "1 of 2 pairs carry no signal" in " ".join(unread.stderr.split())
    assert "75.0%" in unread.stdout, "no preference counts half"
    cut = call(*arguments, "--overlong", "truncate-right")
    assert cut.exit_code == 0, cut.stderr
    assert "no signal" not in cut.stderr


def test_degenerate_training_says_so(backbone_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"prompt": "red", "chosen": "good red", "rejected": "bad red"}
    swapped = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    ties = [{**row, "prompt": " ".join(["blue"] * k), "label": 0.5} for k in range(1, 13)]
    for rows, said, accuracy in (
        ([row], "degenerate fit: a single training pair", "100.0%"),
        ([row] * 4, "degenerate fit: the 4 training pairs are one pair 4 times over", "100.0%"),
        (ties, "degenerate fit: all 12 labels are 0.5", "not defined, since all labels are ties"),
        ([row, swapped], "degenerate fit: the head prefers no response to another", "50.0%"),
    ):
        (tmp_path / "p.jsonl").write_text("".join(json_line(r) for r in rows))
        result = call(
            "train", tmp_path / "p.jsonl", "--backbone", backbone_path, "--features", 16, "--pooling", "mean", "-o",
            tmp_path / "m", "--overwrite",
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        assert said in caplog.text
        assert f"training accuracy {accuracy}; " in " ".join(result.stderr.split())


def test_a_bad_line_leaves_the_results_before_it_and_resume_goes_on(model: Path, tmp_path: Path) -> None:
    source, out, partial = tmp_path / "g.jsonl", tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    good = groups(source, 5).read_bytes().splitlines(keepends=True)
    source.write_bytes(b"".join(good[:3]) + b'{"prompt":"caf\xe9","responses":["a","b"]}\n' + good[4])
    result = call("score", model, source, "-o", out)
    assert result.exit_code == 2
    assert f"{source}:4: not UTF-8" in result.stderr
    assert "has the 3 results before the error" in result.stderr
    assert ids(partial) == [0, 1, 2]
    assert not out.exists()
    again = call("score", model, source, "-o", out)
    assert again.exit_code == 2
    assert "--resume goes on with it" in again.stderr
    source.write_bytes(b"".join(good))
    assert call("score", model, source, "-o", out, "--resume").exit_code == 0
    assert ids(out) == [0, 1, 2, 3, 4]
    assert [json.loads(line)["line"] for line in out.read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert not partial.exists()


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_killed_run_is_gone_on_with_at_its_last_whole_line(model: Path, tmp_path: Path, cut: int) -> None:
    source, out = groups(tmp_path / "g.jsonl", 4), tmp_path / "out.jsonl"
    assert call("score", model, source, "-o", out, "--batch", 1).exit_code == 0
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.unlink()
    (tmp_path / "out.jsonl.partial").write_bytes(b"".join(lines[:2]) + lines[2][:cut])
    result = call("score", model, source, "-o", out, "--resume", "--batch", 1)
    assert result.exit_code == 0, result.stderr
    assert out.read_bytes() == whole
    assert "2 groups" in result.stderr, "what is there is not scored again"


def test_resume_adds_what_an_input_has_got_since(model: Path, tmp_path: Path) -> None:
    source, out = groups(tmp_path / "g.jsonl", 2), tmp_path / "out.jsonl"
    for count in (2, 2, 5):
        assert call("score", model, groups(source, count), "-o", out, "--resume").exit_code == 0
        assert ids(out) == list(range(count))
    good = source.read_text()
    source.write_text(good + json_line({**ROW, "id": 5}) + "oops\n")
    for _ in range(2):
        assert call("score", model, source, "-o", out, "--resume").exit_code == 2
        assert ids(out) == list(range(5))
        assert ids(tmp_path / "out.jsonl.partial") == list(range(6))
    source.write_text(good + json_line({**ROW, "id": 5}))
    assert call("score", model, source, "-o", out, "--resume").exit_code == 0
    assert ids(out) == list(range(6))


def test_resume_does_not_mix_results_of_different_inputs(model: Path, tmp_path: Path) -> None:
    source, out = groups(tmp_path / "g.jsonl", 3), tmp_path / "out.jsonl"
    assert call("score", model, source, "-o", out).exit_code == 0
    before = out.read_text()
    other = groups(tmp_path / "other.jsonl", 4)
    other.write_text(other.read_text().replace('"id": 2', '"id": 20'))
    for read, said in ((other, "of another input"), (groups(tmp_path / "short.jsonl", 2), "ends with line 2")):
        result = call("score", model, read, "-o", out, "--resume")
        assert result.exit_code == 2
        assert said in result.stderr
    for content, said in (("{}\n", "of which line"), ("no json\n", "can go on from"), ("[1]\n", "can go on from")):
        out.write_text(content)
        result = call("score", model, source, "-o", out, "--resume")
        assert result.exit_code == 2
        assert said in result.stderr
        assert out.read_text() == content
        (tmp_path / "out.jsonl.partial").unlink(missing_ok=True)
    first, *others = before.splitlines(keepends=True)
    for place in (out, tmp_path / "out.jsonl.partial"):
        out.unlink(missing_ok=True)
        for damaged, said in (
            ("no json\n", "line 1: not a result"),
            (first[:40] + "\n", "line 1: not a result"),
            ("\udcff\udcfe\n", "line 1: not a result"),
            (others[-1], "line 2: the result of the input's line 2 behind that of line 3"),
        ):
            content = (damaged + "".join(others)).encode(errors="surrogateescape")
            place.write_bytes(content)
            result = call("score", model, source, "-o", out, "--resume")
            assert result.exit_code == 2
            assert f"{place}: {said}" in result.stderr
            assert place.read_bytes() == content
            assert [file.name for file in tmp_path.glob("out.jsonl*")] == [place.name], "nothing else is left"
        # As the message says: cut off before that line, it goes on.
        place.write_text(first)
        assert call("score", model, source, "-o", out, "--resume").exit_code == 0
        assert out.read_text() == before
        out.write_text(before)
    out.write_text(before)
    (tmp_path / "out.jsonl.partial").write_text("something else\n")
    result = call("score", model, source, "-o", out, "--resume")
    assert "Remove one, or begin anew with --overwrite" in result.stderr
    assert call("score", model, source, "--resume").exit_code == 2


def test_groups_that_cannot_be_scored_do_not_keep_the_file_back(model: Path, tmp_path: Path) -> None:
    source, out = groups(tmp_path / "g.jsonl", 3), tmp_path / "out.jsonl"
    lines = source.read_text().splitlines(keepends=True)
    source.write_text(lines[0] + json_line({"prompt": "red", "responses": ["good " * 200, "bad"]}) + lines[2])
    result = call("score", model, source, "-o", out)
    assert result.exit_code == 2
    assert "1 of 3 groups could not be scored; the others are written" in result.stderr
    assert ids(out) == [0, 2]


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    with (tmp_path / "out.partial").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is writing"), opened_output(str(tmp_path / "out")):
            pytest.fail("must not be opened")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_a_run_what_was_written_stays(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "out"
    out.write_text("old")

    def write() -> None:
        with opened_output(str(out)) as output:
            output.write({"id": 0})
            raise error

    with pytest.raises(error):
        write()
    assert (out.read_text(), (tmp_path / "out.partial").read_text()) == ("old", '{"id": 0}\n')


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_a_folder_that_is_removed_meanwhile_costs_no_result(
    tmp_path: Path, error: type[BaseException] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folder" / "out"

    def write() -> None:
        with opened_output(str(out)) as output:
            output.write({"id": 0})
            output.flush()
            shutil.rmtree(out.parent)
            output.write({"id": 1})
            if error is not None:
                raise error

    if error is None:
        write()
    else:
        with pytest.raises(error):
            write()
    assert ids(out if error is None else out.with_name("out.partial")) == [0, 1]
    assert "out.partial was removed while it was written, and is there again" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_file_that_took_the_place_meanwhile_is_not_taken_for_ours(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write() -> None:
        with opened_output(str(out)) as output:
            output.write({"id": 0})
            (tmp_path / "out.partial").unlink()
            (tmp_path / "out.partial").write_text("another program's")

    with pytest.raises(
        RmcoreError, match=r"is left as it is; the results are in .*out\.partial\.[0-9a-f]{8}"
    ) as caught:
        write()
    assert (tmp_path / "out.partial").read_text() == "another program's"
    assert not out.exists()
    assert ids(Path(str(caught.value).rpartition(" in ")[2])) == [0]


def test_devices_and_pipes_are_written_as_they_are(model: Path, tmp_path: Path) -> None:
    source = groups(tmp_path / "g.jsonl", 1)
    assert call("score", model, source, "-o", "/dev/null").exit_code == 0
    assert not Path("/dev/null.partial").exists()
    with pytest.raises(InputError, match="no regular file"):
        check_file("/dev/null", resume=True)
    with pytest.raises(InputError, match="a folder"):
        check_file(str(tmp_path))
    assert call("score", model, source, "-o", tmp_path / "new" / "out").exit_code == 0
    assert ids(tmp_path / "new" / "out") == [0]


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
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from support.models import TableModel, _hand_head
from rmcore.cli import main
from rmcore.model import RewardModel

RewardModel.from_pretrained = lambda *_, **__: TableModel(_hand_head([1.0]), lambda _, text: [float(len(text))])
main()
"""


@pytest.mark.parametrize("locale", ["C", "POSIX", "latin-1"])
def test_bytes_are_utf8_in_every_locale(model: Path, locale: str) -> None:
    stdin = (
        b"\xef\xbb\xbf" + (json_line({"id": "é\ud83d", "prompt": "κ", "responses": ["good ☃", "bad ü"]}) * 2).encode()
    )
    environment = {"LC_ALL": "C" if locale == "latin-1" else locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
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
