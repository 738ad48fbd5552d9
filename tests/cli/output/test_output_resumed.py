"""Commands that are interrupted, and gone on with."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import pytest
from support.cli_output import ROW, call, groups, ids

from rmcore._base.errors import InputError, RmcoreError
from rmcore.cli.output import check_file, json_line, opened_output

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
