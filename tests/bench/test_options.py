"""Options of the benches, and of the judge's test server, that are numbers: none takes what makes no sense."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from rmcore import bench
from rmcore._base.arguments import Number, real, whole

MODULES = [
    f"rmcore.bench.{path.stem}"
    for path in sorted(Path(str(bench.__file__)).parent.glob("*.py"))
    if "ArgumentParser(" in path.read_text()
]
MODULES += ["rmcore.judge.testing.__main__"]
NONSENSE = {float: ("nan", "1e400", "inf", "x", "9" * 5000), int: ("1.5", "9" * 5000, "x", str(2**63))}
TOLD = re.compile(r"error: argument (\S+): got \S.*, expected (a|some) \w+")


@pytest.fixture
def parser_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The parser of a module's command, which ends where it would read its line."""

    class ReadError(Exception):
        pass

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise ReadError(parser)

    def find(name: str) -> argparse.ArgumentParser:
        main = importlib.import_module(name).main
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(ReadError) as found:
            main([])
        monkeypatch.undo()
        parser: argparse.ArgumentParser = found.value.args[0]
        return parser

    return find


@pytest.mark.parametrize("name", MODULES)
def test_no_option_takes_a_number_that_makes_no_sense(
    parser_of: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = parser_of(name)
    own = name.endswith("gpu_check")  # of the standard library alone; below
    for action in parser._actions:
        assert own or action.type not in (int, float), f"{action.option_strings}: by rmcore._base.arguments"
        if not isinstance(action.type, Number):
            continue
        option = action.option_strings[-1]
        given = action.default if isinstance(action.default, list | tuple) else [action.default]
        assert all(value is None or value in action.type.within for value in given), f"{option}: its own default"
        for value in NONSENSE[action.type.kind]:
            with pytest.raises(SystemExit) as ended:
                parser.parse_args([option, value, "1"] if action.nargs == 2 else [f"{option}={value}"])
            said = capsys.readouterr().err.splitlines()[-1]
            assert (ended.value.code, (found := TOLD.search(said)) is not None) == (2, True), said
            assert found is not None
            assert option in found[1].split("/")
            assert len(said) < 300


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("run --total nan", "argument --total: got nan, expected seconds above 0"),
        ("more --total 0", "argument --total: got 0.0, expected seconds above 0"),
        ("run --size 0", "argument --size: got 0, expected a whole number, at least 1"),
    ],
)
def test_the_first_contact_with_a_gpu_which_imports_nothing_of_ours(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("rmcore.bench.gpu_check").main(line.split())
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_there_are_as_many_as_one_would_think(parser_of: Any) -> None:
    count = sum(isinstance(action.type, Number) for name in MODULES for action in parser_of(name)._actions)
    assert len(MODULES) > 20
    assert count > 70


def test_a_number_within_its_bounds_is_read() -> None:
    assert [whole(least=0)(text) for text in ("0", "12")] == [0, 12]
    assert [real(above=0, most=1)(text) for text in ("1e-3", "1")] == [0.001, 1.0]
    for read, text, said in (
        (whole(), "0", "got 0, expected a whole number, at least 1"),
        (whole(least=0, most=65_535), "65536", "got 65536, expected a whole number from 0 to 65535"),
        (real(least=0, most=1), "1.5", "got 1.5, expected a number from 0 to 1"),
        (real(above=0), "inf", "got inf, expected a finite number above 0"),
        (real(), "three", "got 'three', expected a finite number"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{said}$"):
            read(text)
