"""The machine's limits are measured by loops of our own; what runs in emulation is left out, aloud."""

from __future__ import annotations

import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from rmcore.bench import __main__ as command
from rmcore.bench import harness
from rmcore.bench import score as score_suite
from rmcore.bench.harness import Limits, ReadRate
from rmcore.bench.setup import Setup

_cpu = pytest.importorskip("rmcore._cpu")


class Reads:
    """Memory that is known: nothing is read."""

    streams = 4

    def again(self, budget_s: float = 0.1) -> float:
        return 3e9


def test_rates_are_those_of_the_instruction_set_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_least_s", lambda *calls: (calls[0](), 1e-3)[1])
    kinds = ("float32", "bfloat16", "float16", "int8")
    try:
        for isa, times_float32 in (("scalar", 2.0), ("avx2", 4.0), ("avx512_bf16", 4.0)):
            if isa not in ("scalar", _cpu.best_isa()) and not (isa == "avx2" and "avx" in _cpu.best_isa()):
                continue
            _cpu.set_isa(isa)
            limits = harness.measure_limits(torch.device("cpu"), quick=True, reads=Reads())  # type: ignore[arg-type]
            assert limits.bandwidth == 3e9
            assert limits.bandwidth_kind == "read by all threads, 4 streams each, the most in this run"
            assert limits.matrix_kind == f"multiply-adds on registers, {isa}"
            # Operations of one call: as many sums, each of as many numbers as one multiplication takes.
            rates = {kind: limits.matrix[kind] / limits.matrix["float32"] for kind in kinds}
            bf16 = 2.0 if isa == "avx512_bf16" else 1.0
            assert rates == {"float32": 1.0, "bfloat16": bf16, "float16": 1.0, "int8": times_float32}
            assert limits.floor(1.0, 1e12, "float16").seconds == 1e12 / limits.matrix["float16"]
    finally:
        _cpu.set_isa("auto")


def test_rows_that_pass_a_limit_say_that_the_limit_is_wrong() -> None:
    rows = [{"suite": "score", "variant": f"v{k}", "of_limit": share} for k, share in enumerate((0.4, 1.05, 1.2, 1.7))]
    assert command._limits_passed([*rows[:2], {"suite": "memory", "variant": "v"}]) == ""
    told = command._limits_passed(rows)
    assert told.startswith("2 variants pass the limits measured, score v3 at 170%: the limits are wrong")


def test_rows_are_held_against_the_most_the_memory_gave_in_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was slow when it was asked first: a row measured later would pass that limit."""
    rates = iter((20e9, 50e9, 40e9))
    setup = Setup(
        torch.device("cpu"), Limits(30e9, "made up", {"float32": 1e12}), ((64, 64),), (1,), (torch.float32,), 0.0,
        reads=cast("ReadRate", SimpleNamespace(again=lambda: next(rates))),
    )  # fmt: skip

    def suite(setup: Setup) -> Any:
        for flop, seconds in ((1e6, 1e-3), (1e9, 2e-3), (9e8, 1e-3)):
            floor = setup.limits.floor(45e6, flop, "float32")
            yield {"suite": "score", "variant": "v", "h": 1, "d": 1, "rows": 1, "median_s": seconds} | floor.beside(
                seconds
            )

    monkeypatch.setitem(command.SUITES, "score", suite)
    monkeypatch.setattr(command, "environment", lambda device: {})
    results, complete = command.run(setup, ["score"], tmp_path / "out", Console(quiet=True))
    assert complete
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["limits"]["bandwidth"] == 50e9
    first, second, third = document["rows"]
    assert [row["of_limit"] for row in results.rows] == pytest.approx([0.9, 0.5, 0.9])
    assert (first["floor_s"], second["floor_s"], third["floor_s"]) == pytest.approx((9e-4, 1e-3, 9e-4))
    told = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert told[1]["of_limit"] == pytest.approx(1.5)  # as it stood when the row was measured


def test_copies_walk_through_many_times_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 32 << 20)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [harness.rotations(50 << 20, of) for of in (cpu, gpu)] == [12, 3]
    assert harness.rotations(1 << 10, cpu) == 256
    assert harness.cold_bytes(cpu) == 512 << 20
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 1 << 30)
    assert harness.cold_bytes(cpu) == 2 << 30


def test_the_most_that_was_read_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 1 << 20)
    reads = harness.ReadRate()
    taken = iter(([2e-3, 1e-3], [4e-3]))
    monkeypatch.setattr(harness, "_samples_cpu", lambda *_: next(taken))
    assert reads.again() == reads.again() == (64 << 20) / 1e-3


def test_variants_in_turns_are_called_one_after_the_other_over_their_copies() -> None:
    called: list[str] = []
    variants = [
        [partial(called.append, f"{name}{copy}") for copy in range(copies)] for name, copies in (("a", 2), ("b", 3))
    ]
    first, second = harness.time_in_turns(variants, budget_s=0.0, min_samples=4)
    assert called == ["a0", "a1", "b0", "b1", "b2", "a0", "b0", "a1", "b1", "a0", "b2", "a1", "b0"]
    assert first.samples == second.samples == 4
    assert 0 < first.low <= first.median <= first.high


def test_rows_of_the_kernels_say_what_was_read_in_turn_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 1 << 20)
    setup = Setup(
        torch.device("cpu"), Limits(1e9, "made up", {"float32": 1e12}), ((64, 64),), (1,), (torch.bfloat16, torch.int8),
        0.01, compiled=False, reads=ReadRate(),
    )  # fmt: skip
    ours = {(row["variant"], row["dtype"]): row for row in score_suite.score(setup) if "rmcore" in row["variant"]}
    reads = {key: row.get("of_read", math.nan) for key, row in ours.items()}
    assert 0 < reads["rmcore cpu", "int8"] < 1
    assert 0 < reads["rmcore cpu", "bfloat16"] < 1
    assert math.isnan(reads["rmcore torch", "bfloat16"])
    row = ours["rmcore cpu", "int8"]
    rates = reads["rmcore cpu", "int8"] / reads["rmcore cpu", "bfloat16"]
    other = ours["rmcore cpu", "bfloat16"]
    expected = row["bytes"] / row["median_s"] / (other["bytes"] / other["median_s"])
    assert rates == pytest.approx(expected)  # one reading of memory beside both
    assert f"{100 * reads['rmcore cpu', 'int8']:.0f}% of what was read in turn with it" in command._line(row)


def test_bad_arguments_of_the_loop_raise() -> None:
    with pytest.raises(ValueError, match="dtype"):
        _cpu.multiply_all("float64", 1, 1)
    with pytest.raises(ValueError, match="round"):
        _cpu.multiply_all("int8", 0, 1)


def test_what_takes_seconds_a_call_is_left_out_and_not_tried_at_larger_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SLOWEST_CALL_S", 0.0)
    asked: list[str] = []
    device, limits = torch.device("cpu"), Limits(1e9, "none", {"float32": 1e9})
    setup = Setup(device, limits, ((64, 64),), (1, 4, 16), (torch.bfloat16,), 0.01, compiled=False)
    monkeypatch.setattr(
        score_suite, "left_out", lambda call, device: (asked.append("x"), harness.left_out(call, device))[1]
    )
    rows = list(score_suite.score(setup))
    variants = {row["variant"] for row in rows}
    assert {"rmcore cpu", "rmcore torch", "torch eager, folded bf16", "torch eager, folded int8"} <= variants
    assert len(rows) == 3 * len(variants)
    assert len(asked) == len(variants)
    for row in rows:
        assert row["left_out"].startswith("B=1: one call took ")
        line = command._line(row)
        assert f"B={row['rows']} {row['variant']}" in line
        assert "left out (B=1: one call took " in line
    assert "left out" in str(command.tables(rows, {"limits": harness.as_dict(limits)})[0].columns[1]._cells)


def test_isa_starts_anew_with_every_library_held_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    def execve(path: str, arguments: list[str], environment: dict[str, str]) -> None:
        started.extend((path, arguments, environment))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(SystemExit):
        command.main(["--isa", "avx2", "--suite", "score"])
    path, arguments, environment = started
    assert (path, arguments) == (
        sys.executable,
        [sys.executable, "-m", "rmcore.bench", "--isa", "avx2", "--suite", "score"],
    )
    held = {name: environment[name] for name in harness.ISA_VARIABLES}
    assert held == {
        "RMCORE_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
    for name, value in held.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(command, "setup_for", lambda _: (_ for _ in ()).throw(KeyError("set up")))
    with pytest.raises(KeyError, match="set up"):  # held already: goes on
        command.main(["--isa", "avx2"])
    assert harness.environment(torch.device("cpu"))["held_to"] == held


def test_what_torch_compiles_is_kept_apart_by_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's cache would hand a loop of 8 floats a step to a build whose vectors are 16: writes out of bounds."""
    monkeypatch.setattr(command, "setup_for", lambda _: (_ for _ in ()).throw(KeyError("set up")))
    kept = []
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back at the end
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        with pytest.raises(KeyError, match="set up"):
            command.main(["--suite", "score"])
        kept.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert [path.rpartition("-")[2] for path in kept] == ["AVX2", "AVX512"]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "the user's")
    with pytest.raises(KeyError, match="set up"):
        command.main(["--suite", "score"])
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "the user's"
