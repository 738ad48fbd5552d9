"""A bench run prints and keeps every figure as it comes, however it ends."""

from __future__ import annotations

import json
import os
import signal
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.warm import WarmProcess, WarmPython

from rmcore.bench.results_file import ResultsFile, read_results

# The bench with one suite: two rows, then a long silence, and no limits to measure.
SCRIPT = """
import sys, time
import torch
import rmcore.bench.__main__ as command
from rmcore.bench.harness import Limits
from rmcore.bench.setup import Setup

def suite(setup):
    for rows in (1, 4):
        yield {"suite": "slow", "variant": "rmcore x", "h": 8, "d": 8, "rows": rows, "median_s": 0.001, "of_limit": 0.5}
    if "--quick" not in sys.argv:
        time.sleep(100)

command.SUITES.clear()
command.SUITES["slow"] = suite
limits = Limits(1e9, "none", {"float32": 1e9})
command.setup_for = lambda _: Setup(torch.device("cpu"), limits, ((8, 8),), (1,), (torch.float32,), 0.1)
raise SystemExit(command.main())
"""


def start(python: WarmPython, out: Path, *options: str) -> WarmProcess:
    modules = ("torch", "rmcore.bench.__main__", "rmcore.bench.harness", "rmcore.bench.setup")
    return python.start(SCRIPT, "--out", out, *options, modules=modules, env=os.environ | {"PYTHONUNBUFFERED": "1"})


def until_two_rows(process: WarmProcess) -> list[str]:
    assert process.stdout is not None
    lines = []
    while len([line for line in lines if line.startswith("slow ")]) < 2:
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    return lines


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_its_rows_says_where_and_leaves_the_last_full_results(
    tmp_path: Path, number: signal.Signals, warm_python: WarmPython
) -> None:
    out = tmp_path / "cpu"
    out.with_suffix(".json").write_text("of an earlier run")
    process = start(warm_python, out)
    printed = until_two_rows(process)
    assert "slow 8×8 B=1 rmcore x : 1.000 (50%) [ms]\n" in printed
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: the 2 rows measured are in" in " ".join(rest.split())
    header, rows, end = read_results(out.with_suffix(".jsonl"))
    assert header["limits"]["bandwidth"] == 1e9
    assert [row["rows"] for row in rows] == [1, 4]
    assert end == "KeyboardInterrupt"
    assert out.with_suffix(".json").read_text() == "of an earlier run"


def test_a_killed_run_has_lost_nothing_it_printed(tmp_path: Path, warm_python: WarmPython) -> None:
    process = start(warm_python, tmp_path / "cpu")
    until_two_rows(process)
    process.kill()
    process.communicate(timeout=60)
    _, rows, end = read_results(tmp_path / "cpu.jsonl")
    assert [row["rows"] for row in rows] == [1, 4]
    assert end == "killed"


def test_a_full_run_writes_json_and_csv_of_the_same_rows(tmp_path: Path, warm_python: WarmPython) -> None:
    process = start(warm_python, tmp_path / "cpu", "--quick")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    document = json.loads((tmp_path / "cpu.json").read_text())
    _, rows, end = read_results(tmp_path / "cpu.jsonl")
    assert document["rows"] == rows
    assert len(rows) == 2
    assert end == "complete"
    assert len((tmp_path / "cpu.csv").read_text().splitlines()) == 3
    assert "slow, h=8, D=8: ms (% of limit)" in output


def test_an_error_in_a_suite_is_recorded_and_raised(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"suite": "score"}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), ResultsFile(tmp_path / "x", {"limits": {}}) as results:
        deque(map(results.add, rows()))
    assert read_results(tmp_path / "x.jsonl") == ({"limits": {}}, [{"suite": "score"}], "ZeroDivisionError")
    assert not (tmp_path / "x.json").exists()


def test_a_row_cut_in_the_middle_is_left_out_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"limits": {}}\n{"suite": "a"}\n{"suite": "b", "med')
    assert read_results(path) == ({"limits": {}}, [{"suite": "a"}], "killed")
