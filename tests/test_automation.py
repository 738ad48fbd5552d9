"""The hosted CI, the commit hooks and the Makefile name what exists, and the same tools as each other."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def load(path: str) -> dict[Any, Any]:
    return yaml.safe_load((ROOT / path).read_text())


def target(name: str) -> str:
    """The commands of a target."""
    found = re.search(rf"^{name}:.*\n((?:(?:\t.*|#.*)?\n)+)", MAKEFILE, re.MULTILINE)
    assert found, name
    return found[1]


def test_hosted_ci_tests_every_python_the_project_says_it_supports() -> None:
    jobs = load(".github/workflows/ci.yml")["jobs"]
    assert set(jobs) == {"lint", "test", "docs", "wheels"}
    pythons = jobs["test"]["strategy"]["matrix"]["python"]
    said = [c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d", c)]
    assert pythons == said == ["3.11", "3.12", "3.13"]
    built = PROJECT["tool"]["cibuildwheel"]["build"]
    assert [f"3.{name[3:5]}" for name in built] == pythons


def test_hosted_ci_gives_every_job_a_limit_and_every_action_a_version() -> None:
    for name, job in load(".github/workflows/ci.yml")["jobs"].items():
        assert job["timeout-minutes"] <= 30, name
        for step in job["steps"]:
            assert "run" in step or re.fullmatch(r"[\w./-]+@v[\d.]+", step["uses"]), step


def test_hosted_ci_asks_make_for_targets_that_exist() -> None:
    asked = re.findall(r"run: make ([\w-]+)", (ROOT / ".github/workflows/ci.yml").read_text())
    assert set(asked) == {"lint", "test", "coverage", "docs"}
    for name in set(asked) - {"docs"}:
        assert target(name)


def test_the_kernels_of_every_architecture_are_compiled_somewhere() -> None:
    """``make test`` compiles them for one: the gate for all is a target of its own, and part of the local CI."""
    asked = re.findall(r"^(?:(\w+=\w+) )?make ([\w-]+)\b", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert asked == [("", "lint"), ("RMCORE_ALL_ARCHS=1", "test")]
    gate = target("compile-gate")
    assert "RMCORE_ALL_ARCHS=1" in gate
    for path in ("tests/kernels/test_triton_compile.py", "tests/kernels/test_cuda_build.py"):
        assert path in gate
        assert "RMCORE_ALL_ARCHS" in (ROOT / path).read_text()


def test_commit_hooks_run_what_make_lint_runs() -> None:
    (repository,) = load(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local", "hooks fetch nothing: the tools are those of .venv"
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    lint = target("lint")
    for tool in ("ruff check", "ruff format", "clang-format", "mypy", "lint-imports"):
        assert f"$(BIN)/{tool}" in lint, tool
        assert any(f".venv/bin/{tool}" in hook["entry"] for hook in hooks.values()), tool


def test_a_kernels_package_is_refused_and_a_kernel_is_not() -> None:
    hooks = {hook["id"]: hook for hook in load(".pre-commit-config.yaml")["repos"][0]["hooks"]}
    hook = hooks["kernels-is-no-package"]
    assert hook["language"] == "fail"
    assert re.search(hook["files"], "kernels/__init__.py")
    assert not re.search(hook["files"], "kernels/score.py")
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(("answers", "source"), [(True, "the CPU build of"), (False, "from pip's own index")])
def test_set_up_asks_torchs_index_once_and_says_where_torch_comes_from(
    tmp_path: Path, answers: bool, source: str
) -> None:
    """With a stub for Python and pip: one line a step, and no pip call to an index that does not answer."""
    (tmp_path / "bin").mkdir()
    calls = tmp_path / "calls"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *urlopen*) exit {int(not answers)};; esac\nexit 0\n')
    pip = tmp_path / "venv" / "bin" / "pip"
    pip.parent.mkdir(parents=True)
    pip.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    for path in (python, pip):
        path.chmod(0o755)
    venv = tmp_path / "venv"
    command = ["make", "-C", str(ROOT), "-s", f"PYTHON={python}", f"VENV={venv}", "TORCH_CPU=1", f"{venv}/.torch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert len(lines) == 2
    assert source in lines[1]
    (call,) = calls.read_text().splitlines()
    assert ("download.pytorch.org" in call) == answers
