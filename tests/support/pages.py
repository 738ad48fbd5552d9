"""Code in documentation: found, and held against what exists."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import typer.main

from rmcore.cli import app

ROOT = Path(__file__).parents[2]


def pages() -> list[Path]:
    """Every Markdown page that a user may read."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")]
    return sorted(found)


def code_blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of these languages, without the indent of the list they may stand in."""
    names = "|".join(map(re.escape, languages))
    found = re.findall(rf"^( *)```(?:{names})\b[^\n]*\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return ["\n".join(line.removeprefix(indent) for line in block.splitlines()) for indent, block in found]


def python_problems(code: str) -> list[str]:
    """What does not exist: modules, imported names of ours, keywords and attributes our names are used with."""
    problems: list[str] = []
    ours: dict[str, Any] = {}
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            problems += [f"no module {a.name}" for a in node.names if not _importable(a.name)]
        elif isinstance(node, ast.ImportFrom):
            problems += _imported(node, ours)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            problems += _call_problems(node, ours)
    return problems


def command_problems(block: str) -> list[str]:
    """What does not exist of the ``rmcore`` commands, their options and the ``make`` targets in a shell block."""
    problems = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace("$'", "'"), comments=True)
        if words[:1] == ["make"]:
            known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            problems += [f"make {w}" for w in words[1:] if "=" not in w and w not in known]
        elif words[:1] == ["rmcore"]:
            problems += _rmcore_problems(words[1:])
    return problems


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _imported(node: ast.ImportFrom, ours: dict[str, Any]) -> list[str]:
    """Problems of a ``from`` import; names of ours are put into ``ours``."""
    name = str(node.module)
    if not _importable(name):
        return [f"no module {name}"]
    if name.partition(".")[0] != "rmcore":
        return []
    module, problems = importlib.import_module(name), []
    for alias in node.names:
        try:
            ours[alias.asname or alias.name] = getattr(module, alias.name)
        except (AttributeError, ImportError):
            problems.append(f"no {name}.{alias.name}")
    return problems


def _call_problems(node: ast.Call, ours: dict[str, Any]) -> list[str]:
    path = ast.unparse(node.func)
    first, *rest = path.split(".")
    if first not in ours:
        return []
    found = ours[first]
    for name in rest:
        if not hasattr(found, name):
            return [f"no {path}"]
        found = getattr(found, name)
    try:
        parameters = inspect.signature(found).parameters.values()
    except ValueError:
        return []
    if any(p.kind is inspect.Parameter.VAR_KEYWORD and "Never" not in str(p.annotation) for p in parameters):
        return []
    names = {p.name for p in parameters}
    return [f"{path}: no parameter {k.arg}" for k in node.keywords if k.arg is not None and k.arg not in names]


def _rmcore_problems(words: list[str]) -> list[str]:
    if words[:1] == ["bench"]:  # reads its options itself
        known = bench_options() | {"--help"}
        return [
            f"rmcore bench: no option {w}" for w in words if w.startswith("--") and w.partition("=")[0] not in known
        ]
    command: Any = typer.main.get_command(app)
    name = "rmcore"
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name = f"{name} {words[0]}"
        if words[0] not in command.commands:
            return [f"no command {name}"]
        command, words = command.commands[words[0]], words[1:]
    known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
    used = [word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)]
    return [f"{name}: no option {option}" for option in used if option not in known]


def bench_options() -> set[str]:
    """The options of ``rmcore bench``, from its source."""
    source = (ROOT / "bench" / "__main__.py").read_text(encoding="utf-8")
    return set(re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", source))
