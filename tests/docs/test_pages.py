"""The documentation's code names modules, parameters, commands and options that exist."""

from __future__ import annotations

import importlib
import re

import pytest
from support.pages import ROOT, code_blocks, command_problems, pages, python_problems

PAGES = [str(page.relative_to(ROOT)) for page in pages()]


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles_and_what_it_names_exists(page: str) -> None:
    for block in code_blocks(text(page), "python"):
        compile(block, page, "exec")
        assert python_problems(block) == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_exist(page: str) -> None:
    for block in code_blocks(text(page), "sh", "bash"):
        assert command_problems(block) == []


def test_there_is_something_to_check() -> None:
    blocks = {language: sum(len(code_blocks(text(page), language)) for page in PAGES) for language in ("python", "sh")}
    assert blocks["python"] >= 8
    assert blocks["sh"] >= 8


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import rmcore_of_old", "no module rmcore_of_old"),
        ("from rmcore.nowhere import X", "no module rmcore.nowhere"),
        ("from rmcore import Nobody", "no rmcore.Nobody"),
        ("from rmcore import ThresholdRouter", "no rmcore.ThresholdRouter"),
        ("from rmcore import RewardEngine\nRewardEngine(model, jugde=1)", "RewardEngine: no parameter jugde"),
        ("from rmcore import RewardModel\nRewardModel.from_nowhere('x')", "no RewardModel.from_nowhere"),
    ],
)
def test_python_that_is_stale_is_found(code: str, problem: str) -> None:
    assert python_problems(code) == [problem]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("rmcore guess model", "no command rmcore guess"),
        ("rmcore score m g --no-such 1", "rmcore score: no option --no-such"),
        ("rmcore verdicts burn v.db", "no command rmcore verdicts burn"),
        ("rmcore bench \\\n   --no-such", "rmcore bench: no option --no-such"),
        ("make tea", "make tea"),
    ],
)
def test_commands_that_are_stale_are_found(line: str, problem: str) -> None:
    assert command_problems(line) == [problem]


def test_every_path_given_to_a_trainer_exists() -> None:
    for path in ("integrations.slime.group_rm", "integrations.verl.PairwiseRewardManager"):
        module, _, name = f"rmcore.{path}".rpartition(".")
        assert hasattr(importlib.import_module(module), name)
    assert "rmcore.integrations.slime.group_rm" in text("docs/adapters/slime.md")
    assert "pkg://rmcore.integrations.verl" in text("docs/adapters/verl.md")


@pytest.mark.parametrize(("page", "number"), [("docs/quickstart.md", 1), ("docs/judge.md", -1)])
def test_blocks_that_need_nothing_run(page: str, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code_blocks(text(page), "python")[number], page, "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_a_page_exist(page: str) -> None:
    named = re.findall(
        r"`((?:tests|bench|examples|rmcore|csrc|kernels)/[\w/.-]+\.(?:py|h|cpp|cu|json|md))`", text(page)
    )
    assert [path for path in named if "NAME" not in path and not (ROOT / path).is_file()] == []
