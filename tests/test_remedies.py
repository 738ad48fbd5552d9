"""Remedies that messages name exist: options of the command line, arguments of functions, names to import."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import rmcore
from rmcore.cli import app

ROOT = Path(rmcore.__file__).parent
ROOMS = ("_base", "ops", "head", "model", "judge", "engine", "evaluation", "integrations", "cli")

# Options of the trainers and servers that rmcore is plugged into, and of git, iconv, pip and the like.
OTHERS = {
    *("--algo", "--reward", "--reward-key", "--group-rm", "--custom-rm-path", "--rm-url", "--n-samples-per-prompt"),
    *("--apply-chat-template", "--custom-config-path", "--disable-rewards-normalization"),
    *("--pooler-config", "--enable-return-hidden-states", "--disable-radix-cache", "--embeddings", "--ubatch-size"),
    *("--repo-type", "--local-dir"),  # hf download
}
# Keys of the judge's store, names of what one process keeps, of spans.
NO_IMPORTS = {
    "rmcore.pair",
    "rmcore.call",
    "rmcore.lost",
    "rmcore.followed",
    "rmcore.commands",
    "rmcore.score",
    "rmcore.train",
}
# Tables of the judge's store in PostgreSQL, whose schema has this name too.
TABLES = set(re.findall(r"CREATE TABLE (rmcore\.\w+)", (ROOT / "judge/store/postgres_schema.py").read_text()))
# Arguments of trl, verl, transformers, torch and pandas that messages advise.
ARGUMENTS = {
    *("beta", "reward_clip_range", "normalize_advantages", "scale_rewards", "reward_weights"),
    *("multi_objective_aggregation", "use_v1", "use_kl_in_reward"),
}


@functools.cache
def messages() -> tuple[tuple[Path, int, str], ...]:
    return tuple(_messages())


def _messages() -> Iterator[tuple[Path, int, str]]:
    """Every text in the package but docstrings, those of an f-string or of neighbours put together."""
    for room in ROOMS:
        for file in sorted((ROOT / room).rglob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            ignored = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            inner: set[int] = set()
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    parts = [part for part in node.values if isinstance(part, ast.Constant)]
                    inner |= {id(part) for part in parts}
                    yield file, node.lineno, "{}".join(str(part.value) for part in parts)
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in ignored | inner:
                    yield file, node.lineno, node.value


def options(command: Any) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}

    def walk(node: Any, name: str) -> None:
        found.setdefault(name, {"--help"}).update(o for p in node.params for o in (*p.opts, *p.secondary_opts))
        for word, inner in getattr(node, "commands", {}).items():
            walk(inner, f"{name} {word}".strip())

    walk(command, "")
    return found


OPTIONS = options(typer.main.get_command(app))


def test_options_that_messages_name_exist() -> None:
    known = set().union(*OPTIONS.values()) | OTHERS
    checked, wrong = 0, []
    for file, line, text in messages():
        if "testing" in file.parts:  # has a command line of its own
            continue
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text):
            checked += 1
            if option not in known:
                wrong.append(f"{file.relative_to(ROOT)}:{line}: {option}")
    assert not wrong
    assert checked > 60, "the extraction finds nothing any more"


# Where a command's module speaks of what is another command's.
COMMANDS = {
    "train.py": ("train", "upgrade"),
    "score.py": ("score", "best-of", "filter"),
    "best_of.py": ("best-of", "filter"),
    "evaluate.py": ("evaluate",),
    "serve.py": ("serve",),
    "run_demo.py": ("demo",),
}


def test_a_command_names_its_own_options() -> None:
    wrong = []
    for file, line, text in messages():
        if file.parent != ROOT / "cli" or (names := COMMANDS.get(file.name)) is None or "rmcore " in text:
            continue
        known = OTHERS.union(*(OPTIONS[name] for name in names))
        wrong += [
            f"{file.name}:{line}: {option}"
            for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)
            if option not in known
        ]
    assert not wrong


def test_names_that_messages_give_can_be_imported() -> None:
    wrong, checked = [], 0
    for file, line, text in messages():
        if file.name == "moved.py" or text in NO_IMPORTS:
            continue
        for name in re.findall(r"(?<![\w./-])rmcore(?:\.[A-Za-z_]\w*)+", text):
            checked += 1
            if name.endswith(".json") or name == "rmcore._cuda" or TABLES & {name, name.rpartition(".")[0]}:
                continue
            if resolves(name):
                continue
            wrong.append(f"{file.relative_to(ROOT)}:{line}: {name}")
    assert not wrong
    assert checked > 5, "the extraction finds nothing any more"


def resolves(name: str) -> bool:
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        except ImportError:
            return False  # moved
        try:
            for part in parts[size:]:
                found = getattr(found, part)
        except (AttributeError, ImportError):
            return False
        return True
    return False


def parameters() -> set[str]:
    found: set[str] = set()
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    found |= {a.arg for a in (*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs)}
                if isinstance(node, ast.ClassDef):  # fields
                    found |= {
                        f.target.id
                        for f in node.body
                        if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)
                    }
    return found


def test_arguments_that_messages_advise_exist() -> None:
    known, wrong, checked = parameters() | ARGUMENTS, [], 0
    advice = re.compile(
        r"\b(?:[Pp]ass|[Gg]ive|[Ss]et|[Ll]oad it with|runs with)\s+(?:a |an |the |larger )*(?:\w+\.)*"
        r"([a-z]+_[a-z0-9_]+|[a-z_]+(?==))"
    )
    for file, line, text in messages():
        for name in advice.findall(text):
            checked += 1
            if name not in known:
                wrong.append(f"{file.relative_to(ROOT)}:{line}: {name}")
    assert not wrong
    assert checked > 8, "the extraction finds nothing any more"


@pytest.mark.parametrize("name", ["rmcore.data.read_preferences", "rmcore.nowhere", "rmcore.head.fit.nothing"])
def test_the_check_sees_names_that_are_gone(name: str) -> None:
    assert not resolves(name)
