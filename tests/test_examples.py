"""The trainer examples name options and Python names that exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from rmcore.cli import app

EXAMPLES = Path(__file__).parents[1] / "examples"
PAGES = ["verl.md", "openrlhf.md", "slime.md"]


def blocks(page: str, language: str) -> list[str]:
    text = (EXAMPLES / page).read_text()
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return ["\n".join(line.removeprefix(indent) for line in block.splitlines()) for indent, block in found]


@pytest.mark.parametrize("page", PAGES)
def test_every_option_of_our_commands_exists(page):
    commands = typer.main.get_command(app).commands
    checked = 0
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            name, *words = shlex.split(line.replace("$'", "'"), comments=True)[:2] or [""]
            if name != "rmcore":
                continue
            known = {option for parameter in commands[words[0]].params for option in parameter.opts}
            used = [word for word in shlex.split(line.replace("$'", "'"), comments=True) if word.startswith("--")]
            assert set(used) <= known
            checked += len(used)
    assert checked


@pytest.mark.parametrize("page", PAGES)
def test_every_name_imported_from_us_exists(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("rmcore"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_every_path_given_to_a_trainer_exists():
    for path in ("integrations.slime.group_rm", "integrations.verl.PairwiseRewardManager"):
        module, _, name = f"rmcore.{path}".rpartition(".")
        assert hasattr(importlib.import_module(module), name)
    assert "rmcore.integrations.slime.group_rm" in (EXAMPLES / "slime.md").read_text()
    assert "pkg://rmcore.integrations.verl" in (EXAMPLES / "verl.md").read_text()
