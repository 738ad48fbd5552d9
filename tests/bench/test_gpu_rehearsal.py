"""What runs on a GPU alone, on one that is not there: its names exist, its tensors lie where they must, its rows count.

A minute of a GPU that is spent on a NameError, or on a tensor of the CPU beside one of the GPU, does not come back.
"""

from __future__ import annotations

import ast
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support.pretend_gpu import DEVICE, H200, Graph, pretending
from support.pretend_kernels import launches, standing_in

from rmcore import ops
from rmcore.bench import gpu_probe, gpu_report, harness
from rmcore.ops import proven, self_check, sources
from rmcore.ops.backends import cuda, triton, triton_tma

GPU = Path(__file__).parents[1] / "gpu"
SMALL = SimpleNamespace(**{**vars(H200), "L2_cache_size": 1 << 10})


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setenv("RMCORE_SELF_CHECK", "0")
    harness.cache_bytes.cache_clear()
    with pretending(SMALL), standing_in():
        yield
    harness.cache_bytes.cache_clear()


def imported(tree: ast.Module) -> dict[str, object]:
    """What the imports of a file bring, by the name it has there."""
    found: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                found[alias.asname or alias.name.split(".")[0]] = (
                    module if alias.asname else sys.modules[alias.name.split(".")[0]]
                )
        if isinstance(node, ast.ImportFrom) and node.module and node.module != "__future__":
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                found[alias.asname or alias.name] = getattr(module, alias.name)
    return found


@pytest.mark.parametrize("path", [*sorted(GPU.glob("*.py")), Path(str(gpu_probe.__file__))], ids=lambda path: path.name)
def test_every_name_that_the_gpu_is_asked_with_exists(path, monkeypatch):
    """Of everything imported, and of modules and classes whatever is asked of them, however deep."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(GPU.parent / "kernels"))
    tree = ast.parse(path.read_text())
    known = imported(tree)
    asked = 0
    for node in ast.walk(tree):
        chain, inner = [], node
        while isinstance(inner, ast.Attribute):
            chain.append(inner.attr)
            inner = inner.value
        if not chain or not isinstance(inner, ast.Name) or inner.id not in known:
            continue
        of = known[inner.id]
        for name in reversed(chain):
            if not isinstance(of, ModuleType | type):
                break
            assert hasattr(of, name), f"{path.name}:{node.lineno}: {inner.id}.{'.'.join(reversed(chain))}"
            of = getattr(of, name)
            asked += 1
    assert asked > 3


STEPS = (
    ("smoke", "--rows", "1", "17"),
    ("smoke", "--rows", "1", "17", "--dtype", "int8"),
    ("smoke_mid", "--rows", "65", "130"),
    ("score", "--rows", "1", "--dtype", "int8"),
    ("score", "--rows", "9"),
    ("other",),
    ("forms", "--rows", "1", "--forms", "streamed"),
    ("forms", "--rows", "65", "300", "--forms", "mid"),
    ("large", "--rows", "600"),
    ("self_check",),
)


def test_the_steps_of_the_probe_on_a_card_of_another_name(gpu, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    out = tmp_path / "rows.jsonl"
    for step in (("environment",), *STEPS):
        short = ("--size", "96", "--repeats", "1", "--budget", "0")
        assert gpu_probe.main([*step, *short, "--out", str(out)]) == 0
    rows = gpu_report.read_rows(out)
    assert [row for row in rows if "failed" in row] == []
    found = {row["case"] for row in rows if "declined" not in row}
    assert {"score cuda", "score triton", "score_int8 cuda", "score_int8 triton", "score_attributes triton"} <= found
    assert {f"form streamed {on}, score" for on in (True, False)} <= found
    assert [row["clusters"] for row in rows if row["case"] == "plan of score_mid"] == [32, 32]
    assert {f"form mid {name}, score" for name in ("cuda", "triton")} <= found
    assert {
        "self-check of score_mid, cuda",
        "self-check of score_int8, cuda",
        "self-check of score_attributes, triton",
    } <= found
    table = tmp_path / "proven.json"
    assert gpu_report.report(out, tmp_path, table) == 0
    assert (tmp_path / "gpu-nvidia-h200.json").is_file()
    proved = {(row["backend"], row["op"]) for row in json.loads(table.read_text())}
    assert proved == {("triton", op) for op in sources.LAUNCHED} | {
        ("cuda", op) for op in ("score", "score_int8", "score_mid", "power_iteration")
    }
    assert all(
        row["card"] == "NVIDIA H200" and row["right"] and row["bits_equal"] for row in json.loads(table.read_text())
    )
    monkeypatch.setattr(
        proven, "findings", lambda: {f.key: f for f in (proven.Finding(**r) for r in json.loads(table.read_text()))}
    )
    monkeypatch.setattr(self_check, "_known", {})
    monkeypatch.setattr(self_check, "_run", lambda *_: pytest.fail("what was proven is checked again"))
    monkeypatch.setenv("RMCORE_SELF_CHECK", "1")
    assert self_check.refusal("triton", "score", DEVICE) is None


def test_a_profiler_s_single_call_says_nothing_of_bits(gpu, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert gpu_probe.main(["smoke", "--size", "96", "--repeats", "0", "--rows", "1", "--out", str(out)]) == 0
    rows = gpu_report.read_rows(out)
    assert len(rows) == 2
    assert all(row["finite"] and "bits_repeat" not in row for row in rows)
    environment = {"name": "NVIDIA H200", "versions": {}, "commit": "abc"}
    assert gpu_report.findings(environment, rows) == []


def test_an_unknown_card_checks_its_kernels_and_uses_them(gpu, monkeypatch):
    """All of a check but its kernels and its process: problems are made on the card, and what they are held to."""
    monkeypatch.setenv("RMCORE_SELF_CHECK", "1")
    monkeypatch.setattr(self_check, "_known", {})
    monkeypatch.setattr(self_check, "ROWS", (1, 17))
    monkeypatch.setattr(self_check, "REPEATS", 2)
    checked = []

    def run(backend: str, op: str, index: int) -> str | None:
        module = {"cuda": cuda, "triton": triton}[backend]
        checked.append((backend, op))
        return self_check.check(module, op, torch.device("cuda", index))

    monkeypatch.setattr(self_check, "_run", run)
    for dtype in (torch.float16, torch.int8):
        for backend in ("cuda", "triton"):
            assert ops.explain("score", DEVICE, dtype, backend).backend == backend
    for op in ("accumulate", "pair_variance", "score_attributes", "power_iteration"):
        found = ops.explain(op, DEVICE)
        assert found.backend in ("cuda", "triton"), found
    assert len(checked) == len(set(checked)) == 8
    monkeypatch.setattr(self_check, "MID_ROWS", (65, 130))
    weights = self_check._weights(DEVICE, torch.float16)
    assert "is off" in ops.explain("score", DEVICE, torch.float16, "cuda", rows=65, weights=weights).reasons["cuda"]
    with cuda.mid():  # one choice, and auto asks it first for these sizes alone, once it has checked itself
        for rows, backend in ((64, "triton"), (65, "cuda"), (512, "cuda"), (513, "triton")):
            assert ops.explain("score", DEVICE, torch.float16, rows=rows, weights=weights).backend == backend
    assert checked[8:] == [("cuda", "score_mid")]


def test_a_form_that_fails_its_check_is_given_up_and_not_the_backend(gpu, monkeypatch):
    """Each form has a check of its own, asked for where it is chosen; what fails it serves plainly, on that card."""
    monkeypatch.setenv("RMCORE_SELF_CHECK", "1")
    monkeypatch.setattr(self_check, "_known", {})
    monkeypatch.setattr(triton_tma, "_given_up", set())
    asked = []

    def run(backend: str, op: str, index: int) -> str | None:
        asked.append(op)
        return "off by 1" if op == "score_specialized" else None

    monkeypatch.setattr(self_check, "_run", run)
    feature_map = self_check._weights(DEVICE, torch.float16).map
    hopper = SimpleNamespace(kind="sm90", multiprocessors=132)
    assert ops.explain("score", DEVICE, backend="triton").backend == "triton"
    assert asked == ["score"]  # the plain form serves, and nobody asks for the others
    with triton_tma.choosing(triton_tma.Large("specialized")):
        for op in ("score", "accumulate", "score"):
            assert ops.explain(op, DEVICE, backend="triton").backend == "triton"
        forms = [triton_tma.form_of(op, 600, feature_map, hopper, DEVICE) for op in ("score", "accumulate")]
    assert asked == ["score", "score_specialized", "accumulate", "accumulate_specialized"]
    assert forms == ["plain", "specialized"]


def test_kernels_are_handed_tensors_of_the_gpu():
    pytest.importorskip("triton")
    from rmcore.kernels import heuristics

    with pretending(), launches() as names:
        for tail, pairs in (("apart", "by pairs"), ("last", "by groups"), ("apart", "in the product")):
            with heuristics.forms(tail=tail, pairs=pairs):
                for op in sources.LAUNCHED:
                    why = self_check.check(triton, op, DEVICE)  # nothing was computed, so the first number is wrong
                    assert why is None or "NaN" in why or "off by" in why or "bits" in why, (op, why)
    asked = {"project_kernel", "rows_kernel", "project_int8_kernel", "score_int8_kernel", "gate_kernel", "gram_kernel"}
    assert asked <= set(names)


def test_the_stand_in_refuses_what_a_gpu_refuses():
    with pretending():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert (there + 1).device == DEVICE
        assert (there.cpu() + here).device.type == "cpu"
        assert there[torch.tensor([0, 2])].is_cuda
        for mixed in (lambda: there + here, lambda: there @ here, lambda: here[torch.tensor([0], device="cuda")]):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, generator=torch.Generator(), device="cuda")
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        graph, out = torch.cuda.CUDAGraph(), torch.zeros(3, device="cuda")
        with torch.cuda.graph(graph):
            out.copy_(there * 2)
        there.fill_(5)
        graph.replay()
        assert out.tolist() == [10.0] * 3
        assert Graph.recording is None
    assert not torch.cuda.is_available() or torch.cuda.get_device_name() != H200.name
