"""Options of all commands: numbers that make no sense and files that cannot be read are told by option and value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rmcore.cli import app

READ = {"--prices", "--judge-template", "--verdicts", "--constitution", "--from-store", "--train", "--calibrate"}
READ |= {"--ai-labels", "--human", "--config"}


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, one in getattr(command, "commands", {}).items():
        yield from commands(one, (*path, name))
    if path and not hasattr(command, "commands"):
        yield path, command


ALL = dict(commands(typer.main.get_command(app)))


def kind_of(option: Any) -> str:
    """``int``, ``float`` or another word, in the typers that have their own types and in those that have click's."""
    told = getattr(option, "type_descriptor", None)
    return getattr(told.annotation, "__name__", "") if told is not None else option.type.name.removesuffix(" range")


def options(*kinds: str) -> Iterator[tuple[tuple[str, ...], str, str]]:
    for path, command in ALL.items():
        for option in command.params:
            if kind_of(option) in kinds and option.opts[0].startswith("--"):
                yield path, max(option.opts, key=len), kind_of(option)


def test_no_option_takes_a_number_that_makes_no_sense() -> None:
    """Every option of every command; each is refused while the line is read, whatever else is missing on it."""
    runner, seen = CliRunner(), 0
    told = re.compile(r"got \S+, expected (a|some|an) \w+")
    done: set[tuple[str, str]] = set()
    for path, option, kind in options("int", "float", "integer"):
        if (option, kind) in done and path[0] != "serve":
            continue
        done.add((option, kind))
        for value in ("nan", "1e400") if kind == "float" else (str(10**30),):
            seen += 1
            result = runner.invoke(app, [*path, option, value])
            assert result.exit_code == 2, (path, option, value, result.output)
            assert f"rmcore: {option}: got" in result.stderr, (path, option, value, result.stderr)
            assert told.search(result.stderr), (path, option, value, result.stderr)
    assert seen > 90


def test_bounds_of_some_options() -> None:
    runner = CliRunner()
    for line, said in (
        ("score m g --judge-timeout 0", "--judge-timeout: got 0.0, expected a finite number above 0"),
        ("score m g --judge-retries -1", "--judge-retries: got -1, expected a whole number, at least 0"),
        ("score m g --budget -0.1", "--budget: got -0.1, expected a number from 0 to 1"),
        ("score m g --max-cost -1", "--max-cost: got -1.0, expected a finite number, at least 0"),
        ("serve m --port 70000", "--port: got 70000, expected a whole number from 0 to 65535"),
        ("serve m --batch 0", "--batch: got 0, expected a whole number, at least 1"),
        ("evaluate m p --alpha 1", "--alpha: got 1.0, expected a number strictly between 0 and 1"),
        ("plan --backbone m --mfu 1.5", "--mfu: got 1.5, expected a number above 0, at most 1"),
        ("verdicts show s --limit 0", "--limit: got 0, expected a whole number, at least 1"),
        # Of several numbers in one option, and of settings that are made of several options: as they were typed.
        ("benchmark m reward-bench --budgets 0.1,2", "--budgets: got 2.0, expected shares of the pairs, in [0, 1]"),
        ("benchmark m reward-bench --budgets nan", "--budgets: got nan, expected shares of the pairs, in [0, 1]"),
        ("benchmark m reward-bench --thresholds 1,inf", "--thresholds: got inf, expected finite numbers"),
        ("benchmark m reward-bench --keep 0", "--keep: got 0.0, expected numbers above 0, at most 1"),
        ("benchmark m reward-bench --penalties nan", "--penalties: got nan, expected numbers ≥ 0"),
        (
            "benchmark m reward-bench --judge-price 1,-2",
            "--judge-price: got -2.0, expected a finite number, at least 0",
        ),
        (
            "serve m --nemo-gym --nemo-gym-bonus answer_bonus=nan",
            "--nemo-gym-bonus: got 'answer_bonus=nan', expected a finite number, at least 0 after answer_bonus=",
        ),
        (
            "serve m --nemo-gym --nemo-gym-bonus top_percentile=2",
            "--nemo-gym-bonus: got 'top_percentile=2', expected a number from 0 to 1 after top_percentile=",
        ),
        ("serve m --nemo-gym-bonus answer_bonus=1", "--nemo-gym-bonus: got some, expected none without --nemo-gym"),
        ("serve m --group-size 99", "--group-size: got 99, expected 2 to --max-responses = 64, or None"),
        ("serve m --advertise http://a", "--advertise: got 'http://a', expected None, since there are no peers"),
    ):
        result = runner.invoke(app, line.split())
        assert (result.exit_code, result.stderr) == (2, f"rmcore: {said}\n")


@pytest.mark.parametrize("command", ["serve m", "label {}", "score m {}"])
def test_a_design_is_told_by_its_option(command: str, tmp_path: Path) -> None:
    groups = tmp_path / "g.jsonl"
    groups.write_text('{"prompt": "p", "responses": ["a", "b"]}\n')
    result = CliRunner().invoke(app, [*command.format(groups).split(), "--design", "regular:3"])
    assert (result.exit_code, "rmcore: --design: got 'regular:3', expected 'all'" in result.stderr) == (2, True)


def test_a_file_that_cannot_be_read_is_told_by_its_option(tmp_path: Path) -> None:
    runner, found = CliRunner(), set()
    for path, command in ALL.items():
        for option in command.params:
            name = max(option.opts, key=len)
            if name not in READ:
                continue
            found.add(name)
            missing = str(tmp_path / "none.json")
            result = runner.invoke(app, [*path, name, missing])
            assert result.exit_code == 2, (path, name, result.output)
            said = f"rmcore: {name}: got {missing!r}, expected a file that can be read: no such file or directory\n"
            assert result.stderr == said, (path, name)
    assert found == READ
    for name, value, said in (
        ("--prices", str(tmp_path), f"got {str(tmp_path)!r}, a folder, expected a file"),
        ("--judge-template", str(tmp_path / ("x" * 300)), "expected a file that can be read: file name too long"),
    ):
        result = runner.invoke(app, ["score", name, value])
        assert (result.exit_code, said in result.stderr) == (2, True), result.stderr


def test_what_a_file_holds_is_told_by_its_option_too(tmp_path: Path) -> None:
    runner, groups = CliRunner(), tmp_path / "g.jsonl"
    groups.write_text('{"prompt": "p", "responses": ["a", "b"]}\n')
    live = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m", "--judge-key-env", ""]
    file = tmp_path / "x.file"
    file.write_bytes(b"caf\xe9")
    for command, option, given in (
        ("score", "--prices", [*live, "--budget", "0.5"]),
        ("score", "--judge-template", [*live, "--budget", "0.5"]),
        ("score", "--verdicts", ["--budget", "0.5"]),
        ("critique", "--judge-template", live),
        ("label", "--constitution", live),
    ):
        model = ["model"] if command == "score" else []
        result = runner.invoke(app, [command, *model, str(groups), *given, option, str(file)])
        assert (result.exit_code, result.stderr.splitlines()[-1].startswith(f"rmcore: {option}: ")) == (2, True), (
            command,
            option,
            result.stderr,
        )
        assert "x.file" in result.stderr


def test_verdicts_of_no_row_and_a_template_with_a_zero_byte_are_refused_before_the_model_loads(tmp_path: Path) -> None:
    runner, groups = CliRunner(), tmp_path / "g.jsonl"
    groups.write_text('{"prompt": "p", "responses": ["a", "b"]}\n')
    live = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m", "--judge-key-env", ""]
    empty, template = tmp_path / "none.jsonl", tmp_path / "t.txt"
    for words in ("", "\n\n", "[]"):
        empty.write_text(words)
        for command in (
            ["score", "no-such-model", str(groups), "--budget", "0.5"],
            ["serve", "no-model", "--budget", "1"],
        ):
            result = runner.invoke(app, [*command, "--verdicts", str(empty)])
            said = f"rmcore: --verdicts: got {str(empty)!r}, with no row, expected recorded verdicts, a row each\n"
            assert (result.exit_code, result.stderr) == (2, said)
    for command in (["score", "no-such-model", str(groups), "--budget", "0.5"], ["critique", str(groups)]):
        fields = "$prompt $first $second" if command[0] == "score" else "$prompt $first"
        for system, user in (("a\0b ", ""), ("", "a\0b ")):
            template.write_text(f"--- system ---\n{system}$contract\n--- user ---\n{user}{fields}\n")
            result = runner.invoke(app, [*command, *live, "--judge-template", str(template)])
            said = "rmcore: --judge-template: got NUL at character 1, as UTF-16 text has them, expected text\n"
            assert (result.exit_code, result.stderr) == (2, said), command
