"""``--resume`` goes on behind results that are what was written of this input, and behind nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import DataError, RmcoreError
from rmcore.cli.output import Output, check_file, opened_output
from rmcore.cli.records import Chain, json_line, model_identity, run_digest
from rmcore.cli.resumed import groups_behind
from rmcore.model.data import Group
from rmcore.model.data.results import group_result

GROUPS = [Group(f"prompt {k}", ("a", f"b\ud83d{k}"), id=k if k % 2 else None, line=2 * k + 1) for k in range(6)]


def write(out: Path, groups: Iterable[Group], run: str = "run", *, resume: bool = True) -> list[int]:
    """Write a result of each group that has none; the lines of those."""
    with opened_output(str(out), resume=resume) as output:
        output.chain = Chain(run)
        done = []
        for group in groups_behind(iter(groups), output.done(), str(out), output.chain):
            if group.line != 5:  # one that cannot be scored
                output.write(group_result(group, {"rewards": [0.1 * group.line, -1e-300], "of": group.prompt}))
            done.append(group.line)
    return done


def test_a_run_in_pieces_writes_what_one_run_writes(tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole.jsonl", tmp_path / "pieces.jsonl"
    assert write(whole, GROUPS, resume=False) == [1, 3, 5, 7, 9, 11]
    assert [write(pieces, GROUPS[:count]) for count in (1, 4, 6, 6)] == [[1], [3, 5, 7], [9, 11], []]
    assert pieces.read_bytes() == whole.read_bytes()


LINES = st.integers(0, 4)


@given(st.data(), st.sampled_from(["value", "key", "id", "gone", "swapped", "doubled", "input", "renamed", "taken"]))
def test_whatever_was_changed_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, how: str) -> None:
    out = tmp_path_factory.mktemp("changed") / "out.jsonl"
    write(out, GROUPS, resume=False)
    lines, groups = [json.loads(line) for line in out.read_text().splitlines()], list(GROUPS)
    k = data.draw(LINES)
    match how:
        case "value":
            lines[k]["rewards"][0] += 1e-9
        case "key":
            del lines[k]["of"]
        case "id":
            lines[k]["id"] = "another"
        case "gone":  # the last cannot be told from one that was not reached
            del lines[k if k < 4 else 3]
        case "swapped":
            other = (k + 1) % 5
            lines[k], lines[other] = lines[other], lines[k]
        case "doubled":
            lines.insert(k, lines[k])
        case "input":
            place = data.draw(st.sampled_from([0, 1, 3, 4, 5]))
            groups[place] = replace(GROUPS[place], responses=("a", "c"))
        case "renamed":
            groups = [replace(group, line=group.line + 1) for group in GROUPS]
        case "taken":  # of another run, of which a part was written over this one
            write(out, [replace(group, prompt="another") for group in GROUPS], resume=False)
            lines[k] = json.loads(out.read_text().splitlines()[k])
    content = "".join(map(json_line, lines))
    out.write_text(content)
    with pytest.raises(DataError, match=r"line \d"):
        write(out, groups)
    assert out.read_text() == content
    assert [file.name for file in out.parent.iterdir()] == ["out.jsonl"]


def test_written_anew_by_another_program_they_are_the_same(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    write(out, GROUPS[:4], resume=False)
    out.write_text("".join(json.dumps(json.loads(line), indent=None) + "\n" for line in out.read_text().splitlines()))
    assert write(out, GROUPS) == [9, 11]


def test_results_of_another_model_or_other_options_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    write(out, GROUPS[:4], resume=False)
    with pytest.raises(DataError, match="line 1: got a result of another model, or of other options"):
        write(out, GROUPS, run="other")
    model = tmp_path / "model"
    model.mkdir()
    digests = set()
    for content, settings in (("{}", {}), ("{ }", {}), ("{}", {"penalty": 1.0})):
        (model / "rmcore.json").write_text(content)
        digests.add(run_digest(str(model), settings))
    assert len(digests) == 3
    assert run_digest("org/name", {}) == run_digest("org/name", {}) != run_digest("org/other", {})


def test_results_without_digests_are_taken_by_line_and_id_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text('{"line": 1}\n{"id": 1, "line": 3}\n')
    assert write(out, GROUPS[:4]) == [5, 7]
    assert write(out, GROUPS) == [9, 11]
    assert caplog.text.count("only the line and the id of each were checked") == 2
    out.write_text('{"line": 1}\n{"id": 7, "line": 3}\n')
    with pytest.raises(DataError, match="the id 7 for line 3, which has 1"):
        write(out, GROUPS)


def test_a_full_disk_names_the_file_and_what_is_really_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RmcoreError, match=r"--out: got '/dev/full', which cannot be written to: No space left"):
        write(Path("/dev/full"), GROUPS, resume=False)

    class Full:
        """A stream whose disk has room for the first two lines."""

        def __init__(self, stream: object) -> None:
            self.stream, self.left = stream, 2

        def write(self, text: str) -> None:
            self.stream.write(text)  # type: ignore[attr-defined]

        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    def fill(output: Output) -> None:
        for k in range(2):
            output.write({"line": k})
        output.flush()
        output.stream = Full(output.stream)  # type: ignore[assignment]
        output.count += 7  # written, and lost with the buffer
        output.flush()

    out = tmp_path / "out.jsonl"
    with pytest.raises(RmcoreError, match="No space left"), opened_output(str(out)) as output:
        fill(output)
    assert f"{out}.partial has the 2 results before the error" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize("name", ["out.jsonl.gz", "out.zst", "out.csv", "out.arrow"])
def test_a_name_that_says_another_format_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="a name of what is written, JSON Lines or Parquet"):
        check_file(str(tmp_path / name))
    check_file(str(tmp_path / name), rows=False)  # a table or a plot, written otherwise


def test_a_model_is_told_by_what_it_is_and_not_by_its_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def cached(name: str, sha: str, file: str) -> None:
        """What a download leaves: main is ``sha``, which has ``file``."""
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        for place, content in ((f"snapshots/{sha}/{file}", "{}"), ("refs/main", sha)):
            (repository / place).parent.mkdir(parents=True, exist_ok=True)
            (repository / place).write_text(content)

    def identities() -> list[str]:
        return [model_identity(name) for name in names]

    folder, bare, gguf = tmp_path / "rm", tmp_path / "bare", tmp_path / "critic.gguf"
    names = ["org/published", "org/rm", str(folder), str(bare), str(gguf)]
    for place in (folder, bare):
        place.mkdir()
    (folder / "rmcore.json").write_text(json.dumps({"backbone": {"name": "org/body", "revision": None}}))
    (bare / "config.json").write_text("{}")
    gguf.write_bytes(b"GGUF 1")
    unknown = identities()
    changes = [
        lambda: cached("org/published", "a" * 40, "config.json"),
        lambda: cached("org/rm", "a" * 40, "rmcore.json"),
        lambda: cached("org/body", "a" * 40, "config.json"),
        lambda: (bare / "config.json").write_text('{"hidden_size": 3}'),
        lambda: gguf.write_bytes(b"GGUF 2"),
    ]
    before = unknown
    for k, change in enumerate(changes):
        change()
        after = identities()
        assert [i for i in range(5) if before[i] != after[i]] == [k]
        before = after
    for k, (name, file) in enumerate((("published", "config.json"), ("rm", "rmcore.json"), ("body", "config.json"))):
        cached(f"org/{name}", "b" * 40, file)
        assert [i for i, (one, other) in enumerate(zip(before, identities(), strict=True)) if one != other] == [k]
        before = identities()
    (folder / "rmcore.json").write_text(json.dumps({"backbone": {"name": "org/body", "revision": "a" * 40}}))
    pinned = model_identity(str(folder))
    cached("org/body", "c" * 40, "config.json")
    assert model_identity(str(folder)) == pinned, "main moved, and the model is of another commit"
