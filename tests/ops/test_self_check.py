"""An unproven kernel must show that it is right before it serves; a wrong, racy, crashing or hanging one never does."""

from __future__ import annotations

import inspect
import json
import logging
import stat
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rmcore._base.errors import BackendError
from rmcore.ops import dispatch, proven, self_check, sources
from rmcore.ops.backends import cpu as cpu_backend
from rmcore.ops.backends import torch as torch_backend
from rmcore.ops.tasks import AccumulateTask, guarded_pairs

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


class Broken:
    """The torch backend with something done to what it returns."""

    def __init__(self, harm: Any) -> None:
        self.harm, self.calls = harm, 0

    def score(self, hidden, weights, out):
        self.calls += 1
        torch_backend.score(hidden, weights, out)
        out.copy_(self.harm(out, self.calls))

    def accumulate(self, task):
        total = torch_backend.accumulate(task)
        task.precision.copy_(self.harm(task.precision, 1))
        return total

    def pair_variance(self, hidden, sizes, weights):
        g, v = torch_backend.pair_variance(hidden, sizes, weights)
        return g, self.harm(v, 1)

    def power_iteration(self, weight, vector, iterations):
        sigma, new = torch_backend.power_iteration(weight, vector, iterations)
        return self.harm(sigma, 1), new

    def score_attributes(self, hidden, weights, gate_hidden):
        summary, outputs, gates = torch_backend.score_attributes(hidden, weights, gate_hidden)
        self.calls += 1
        return self.harm(summary, self.calls), outputs, gates


@pytest.mark.parametrize("op", sources.LAUNCHED)
@pytest.mark.parametrize("backend", [torch_backend, cpu_backend], ids=["torch", "cpu"])
def test_right_kernels_pass(op, backend):
    if backend is cpu_backend and cpu_backend.unavailable(op, CPU, torch.float16):
        pytest.skip("the cpu backend is not part of this build")
    assert self_check.check(backend, op, CPU) is None


@pytest.mark.parametrize("op", sources.LAUNCHED)
@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda x, _: x * 1.05, "off by"),
        (lambda x, _: torch.full_like(x, float("nan")), "NaN or Inf, or not written"),
        (lambda x, _: torch.zeros_like(x), "off by"),
        (lambda x, _: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["five percent", "nothing written", "zeros", "raises"],
)
def test_wrong_kernels_do_not(op, harm, says):
    why = self_check.check(Broken(harm), op, CPU)
    assert why is not None
    assert says in why


def test_bits_that_move_are_a_race():
    why = self_check.check(Broken(lambda x, n: x + 1e-5 * (n == 7)), "score", CPU)
    assert why == "score of 1 rows: bits move from call to call"
    why = self_check.check(Broken(lambda x, n: x + 1e-5 * (n == 7)), "score_attributes", CPU)
    assert why == "score_attributes of 1 rows: bits move from call to call"


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Path:
    """A machine with a card, and nothing known of it."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=0: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(self_check, "_machine", lambda index: f"machine {index}")
    monkeypatch.setattr(self_check, "_known", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RMCORE_SELF_CHECK", raising=False)
    monkeypatch.delenv("RMCORE_CACHE", raising=False)
    return tmp_path


@pytest.fixture
def outcome(monkeypatch):
    """What the checks find, and how often they are run."""
    found = SimpleNamespace(why=None, runs=[])

    def run(backend: str, op: str, index: int) -> str | None:
        found.runs.append((backend, op, index))
        return found.why

    monkeypatch.setattr(self_check, "_run", run)
    return found


def test_a_machine_pays_once(machine, outcome, monkeypatch):
    for _ in range(3):
        assert self_check.refusal("triton", "score", GPU) is None
    monkeypatch.setattr(self_check, "_known", {})  # another process
    assert self_check.refusal("triton", "score", GPU) is None
    assert outcome.runs == [("triton", "score", 0)]
    assert self_check.refusal("triton", "accumulate", GPU) is None
    assert self_check.refusal("cuda", "score", GPU) is None
    monkeypatch.setattr(self_check, "_machine", lambda index: "another driver")
    monkeypatch.setattr(self_check, "_known", {})
    assert self_check.refusal("triton", "score", GPU) is None
    assert len(outcome.runs) == 4


def test_a_failure_is_told_in_every_process_and_names_the_way_out(machine, outcome, monkeypatch, caplog):
    outcome.why = "score of 64 rows: bits move from call to call"
    for _ in range(2):
        monkeypatch.setattr(self_check, "_known", {})
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            why = self_check.refusal("triton", "score", GPU)
            assert self_check.refusal("triton", "score", GPU) == why
        assert why == (
            "it failed its self-check on NVIDIA H100 80GB HBM3: score of 64 rows: bits move from call to call "
            "(RMCORE_SELF_CHECK=0 serves it all the same)"
        )
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "does not serve" in caplog.text
    assert len(outcome.runs) == 1
    monkeypatch.setenv("RMCORE_SELF_CHECK", "0")
    assert self_check.refusal("triton", "score", GPU) is None


CARD = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def measured(monkeypatch):
    """Puts one row into the table of what was measured on cards."""
    monkeypatch.setattr(self_check, "_triton_version", lambda: "3.6.0")
    monkeypatch.setattr(self_check, "sources", lambda backend, op: f"sources of {backend}")

    def put(**row: Any) -> None:
        sources = {"sources": f"sources of {row['backend']}", "commit": "abc", "right": True, "bits_equal": True}
        found = proven.Finding(**({"card": CARD, "op": "score", "triton": "3.6.0"} | sources | row))
        monkeypatch.setattr(proven, "findings", lambda: {found.key: found})
        monkeypatch.setattr(self_check, "_known", {})

    return put


def test_neither_torch_nor_a_cpu_nor_a_proven_card_is_checked(machine, outcome, measured):
    assert self_check.refusal("torch", "score", GPU) is None
    assert self_check.refusal("cpu", "score", CPU) is None
    measured(backend="triton")
    assert self_check.refusal("triton", "score", GPU) is None
    measured(backend="cuda", triton="")
    assert self_check.refusal("cuda", "score", GPU) is None
    assert outcome.runs == []


def test_a_kernel_that_does_not_know_its_sources_is_not_proven_by_a_row_that_does_not_either(
    machine, outcome, measured, monkeypatch
):
    measured(backend="cuda", triton="", sources="")
    monkeypatch.setattr(self_check, "sources", lambda backend, op: "")
    assert self_check.refusal("cuda", "score", GPU) is None
    assert len(outcome.runs) == 1


def test_an_outcome_is_of_one_build(machine, outcome, monkeypatch):
    for built in ("by one compiler", "by another"):
        monkeypatch.setattr(self_check, "build", lambda backend, op, built=built: built)
        monkeypatch.setattr(self_check, "_known", {})
        assert self_check.refusal("cuda", "score", GPU) is None
    assert len(outcome.runs) == 2


@pytest.mark.parametrize(
    "other", [{"card": "NVIDIA H200"}, {"op": "accumulate"}, {"triton": "3.9.0"}, {"sources": "older ones"}]
)
def test_a_row_proves_only_what_it_is_about(machine, outcome, measured, other):
    measured(backend="triton", **other)
    assert self_check.refusal("triton", "score", GPU) is None
    assert len(outcome.runs) == 1


@pytest.mark.parametrize("sources", ["sources of triton", "older ones"])
def test_kernels_whose_bits_moved_on_this_card_with_this_triton_do_not_serve(
    machine, outcome, measured, monkeypatch, caplog, sources
):
    measured(backend="triton", bits_equal=False, sources=sources)
    module = SimpleNamespace(unavailable=lambda op, device, dtype: None)
    monkeypatch.setattr(dispatch, "_module", lambda name: module)
    with caplog.at_level(logging.WARNING):
        found = dispatch.explain("score", GPU, backend="triton")
    assert found.backend == "none"
    told = f"its bits moved from call to call on {CARD} with Triton 3.6.0 when it was measured there (commit abc)"
    assert found.reasons["triton"].startswith(told)
    assert told in caplog.text
    assert outcome.runs == []
    assert dispatch.explain("accumulate", GPU, backend="triton").backend == "triton"  # that one's did not
    monkeypatch.setattr(self_check, "_triton_version", lambda: "3.9.0")
    monkeypatch.setattr(self_check, "_known", {})
    assert dispatch.explain("score", GPU, backend="triton").backend == "triton"
    measured(backend="triton", triton="3.9.0", right=False)
    assert "its results were wrong" in dispatch.explain("score", GPU, backend="triton").reasons["triton"]
    monkeypatch.setenv("RMCORE_SELF_CHECK", "0")
    assert dispatch.explain("score", GPU, backend="triton").backend == "triton"


def test_the_shipped_table_reads():
    assert all(len(row.key) == 4 for row in proven.findings().values())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"ok": true}', "\x00"])
def test_an_unreadable_note_is_no_outcome(machine, outcome, monkeypatch, text):
    assert self_check.refusal("triton", "score", GPU) is None
    (note,) = (machine / "rmcore" / "self-check").iterdir()
    note.write_text(text)
    monkeypatch.setattr(self_check, "_known", {})
    assert self_check.refusal("triton", "score", GPU) is None
    assert len(outcome.runs) == 2
    assert json.loads(note.read_text())["failed"] is None


def test_a_home_that_cannot_be_written_costs_a_check_a_process_and_nothing_else(machine, outcome):
    (machine / "rmcore").write_text("a file where the folder should be")
    assert self_check.refusal("triton", "score", GPU) is None
    assert len(outcome.runs) == 1


def test_without_a_cache_every_process_checks(machine, outcome, monkeypatch):
    monkeypatch.setenv("RMCORE_CACHE", "off")
    for _ in range(2):
        monkeypatch.setattr(self_check, "_known", {})
        assert self_check.refusal("triton", "score", GPU) is None
    assert len(outcome.runs) == 2
    assert list(machine.iterdir()) == []


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kill -SEGV $$", "exit code -11"),
        ("echo CUDA error: illegal memory access >&2; exit 1", "exit code 1 (CUDA error: illegal memory access)"),
        ("echo not json", "exit code 0"),
        ("exec sleep 600", "did not end within 1 s"),
        ("sleep 600 & wait", "did not end within 1 s"),
    ],
)
def test_a_check_that_crashes_or_hangs_is_a_failure(monkeypatch, tmp_path, text, says):
    monkeypatch.setattr(sys, "executable", script(tmp_path / "python", text))
    monkeypatch.setattr(self_check, "TIME_LIMIT_S", 1.0)
    began = time.monotonic()
    why = self_check._run("triton", "score", 0)
    assert why is not None
    assert says in why
    assert time.monotonic() - began < 20


def test_a_python_that_is_not_there_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    assert "could not be started" in str(self_check._run("triton", "score", 0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is no GPU to fail on")
def test_the_real_child_reports_what_stopped_it():
    assert "CUDA" in str(self_check._run("torch", "score", 0))


def test_auto_goes_on_to_the_next_backend_and_a_named_one_raises(monkeypatch):
    module = SimpleNamespace(unavailable=lambda op, device, dtype: None)
    monkeypatch.setattr(dispatch, "_module", lambda name: module)
    monkeypatch.setattr(dispatch, "refusal", lambda name, op, device: "wrong here" if name != "torch" else None)
    found = dispatch.explain("score", GPU)
    assert (found.backend, found.reasons) == ("torch", {"cuda": "wrong here", "triton": "wrong here"})
    call: Any = SimpleNamespace(device=GPU, dtype=torch.float16, shape=(3, 4))
    with pytest.raises(BackendError, match="cannot run score here: wrong here"):
        dispatch.select("score", call, torch.float16, "triton")


# -- pair indices on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [None, -1, 7, 2**40])
def test_wrong_pair_indices_are_safe_to_read_with_and_no_result_is_a_number(bad):
    pairs = torch.tensor([[0, 6], [3, 2]])
    if bad is not None:
        pairs[1, 0] = bad
    safe, labels = guarded_pairs(pairs, torch.tensor([1, 0]), 7)
    assert 0 <= int(safe.min()) <= int(safe.max()) < 7
    assert bool(labels.isnan().all()) == (bad is not None)
    feature_map = self_check._weights(CPU, torch.float32).map
    d = feature_map.num_features
    hidden, zeros = torch.randn(7, feature_map.hidden_size), torch.zeros(d)
    task = AccumulateTask(hidden, labels, feature_map, zeros, torch.zeros(d, d), zeros.clone(), safe)
    total = torch_backend.accumulate(task)
    assert bool(total.isnan()) == bool(task.gradient.isnan().any()) == (bad is not None)


def test_the_machine_is_known_without_private_names_of_torch(monkeypatch):
    """torch 2.11 on a GPU lacks _cuda_getDriverVersion: on every unproven card the first call raised AttributeError."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _index: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: (9, 0))
    self_check._machine.cache_clear()
    try:
        known = json.loads(self_check._machine(0))
    finally:
        self_check._machine.cache_clear()
    assert known["card"] == "a card"
    assert isinstance(known["driver"], str)
    assert known["driver"]
    assert "_C." not in inspect.getsource(self_check)
