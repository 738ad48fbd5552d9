"""A resources server that NeMo-Gym starts itself (``gym env start``, ``ng_run``): its configuration as our options.

The ``app.py`` that NeMo-Gym runs calls :func:`main`. Keys of ``genrm_compare``'s own configuration that mean something
here are taken over, ``model`` and ``options`` are ours, and what is left is told on stderr: nothing is read and then
not done.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import typer

from rmcore._base.errors import reject
from rmcore.cli.console import notes, reported_errors

__all__ = ["main", "serve_arguments"]

_CONFIG, _NAME = "NEMO_GYM_CONFIG_DICT", "NEMO_GYM_CONFIG_PATH"
_OPTIONS = {
    "host": "--host",
    "port": "--port",
    "num_rollouts_per_prompt": "--group-size",
    "cohort_collection_timeout_s": "--time-limit",
}
_DESIGNS = {"circular": "circular", "all_pairs": "all"}
# Of any server, and of genrm_compare: about somebody else.
_ELSEWHERE = frozenset(
    {"entrypoint", "domain", "verified", "description", "value", "datasets", "name", "num_workers", "debug_logging"}
)
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def serve_arguments(config: Mapping[str, Any], name: str) -> tuple[list[str], list[str]]:
    """Arguments of ``rmcore``, and the keys that nothing was made of.

    Args:
        config: NeMo-Gym's whole configuration.
        name: of the server that this process is.

    Raises InputError for what cannot be, and names the key.
    """
    own = _own(config, name)
    if not own.get("model"):
        reject("model", repr(own.get("model")), "the reward model: a folder with rmcore.json, or a hub name")
    if (own.get("num_workers") or 1) > 1:
        reject("num_workers", own["num_workers"], "1: groups come together in one process")
    from rmcore.integrations.server.gym_bonuses import GymBonuses

    bonuses = {one.name for one in dataclasses.fields(GymBonuses)}
    arguments, left = ["serve", str(own["model"]), "--nemo-gym"], []
    for key, value in own.items():
        if key in _ELSEWHERE or key in ("model", "options", "use_principle"):
            continue
        if key in _OPTIONS:
            arguments += [_OPTIONS[key], str(value)]
        elif key == "comparison_strategy":
            if value not in _DESIGNS:
                reject(key, repr(value), f"one of {', '.join(_DESIGNS)}")
            arguments += ["--design", _DESIGNS[value]]
        elif key in bonuses:
            arguments += ["--nemo-gym-bonus", f"{key}={value}"]
        elif key == "default_principle" and own.get("use_principle"):
            arguments += ["--judge-principle", str(value)]
        else:
            left.append(key)
    if own.get("use_principle") and "default_principle" not in own:
        reject("default_principle", "nothing", "a text, since use_principle is true")
    return arguments + _options(own.get("options") or {}), left


def _options(given: Any) -> list[str]:
    if not isinstance(given, Mapping):
        reject(
            "options", type(given).__name__, "options of rmcore serve by name, as in judge-url: http://judge:8000/v1"
        )
    arguments: list[str] = []
    for key, value in given.items():
        option = "--" + str(key).lstrip("-").replace("_", "-")
        if value is True:
            arguments.append(option)
        elif value is not False and value is not None:
            for one in value if isinstance(value, list) else [value]:
                arguments += [option, str(one)]
    return arguments


def _own(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A server's configuration, two levels below its name; references to other keys (``${key}``) followed."""
    found: Any = config.get(name)
    for _ in range(2):
        if not isinstance(found, Mapping) or not found:
            reject(name, type(found).__name__, "resources_servers, a folder's name, and the server's configuration")
        found = next(iter(found.values()))
    if not isinstance(found, Mapping):
        reject(name, type(found).__name__, "the server's configuration")
    return {key: _resolved(value, config) for key, value in found.items()}


def _resolved(value: Any, config: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _resolved(one, config) for key, one in value.items()}
    if isinstance(value, list):
        return [_resolved(one, config) for one in value]
    if not isinstance(value, str):
        return value
    whole = _REFERENCE.fullmatch(value)
    if whole is not None:
        return _at(config, whole[1])
    return _REFERENCE.sub(lambda found: str(_at(config, found[1])), value)


def _at(config: Mapping[str, Any], path: str) -> Any:
    found: Any = config
    for key in path.split("."):
        if not isinstance(found, Mapping) or key not in found:
            reject(f"${{{path}}}", "no such key", "one of the configuration's")
        found = found[key]
    return found


def main() -> None:
    """Serve as NeMo-Gym's environment says, until it sends SIGINT. Exits as ``rmcore serve``."""
    from rmcore.cli import main as command

    try:
        with reported_errors():
            sys.argv = ["rmcore", *_told()]
    except typer.Exit as ended:  # no command of ours has begun that would take it
        sys.exit(ended.exit_code)
    command()


def _told() -> list[str]:
    """Arguments by the environment; what nothing was made of is told on stderr."""
    import yaml

    if _CONFIG not in os.environ or _NAME not in os.environ:
        reject(_CONFIG, "nothing", "NeMo-Gym's configuration: gym env start sets it")
    config = yaml.safe_load(os.environ[_CONFIG])
    if not isinstance(config, Mapping):
        reject(_CONFIG, type(config).__name__, "a mapping")
    arguments, left = serve_arguments(config, os.environ[_NAME])
    if left:
        notes.print(f"[yellow]not used here, and without effect: {', '.join(sorted(left))}[/yellow]")
    return arguments
