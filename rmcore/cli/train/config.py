"""``rmcore train --config train.yaml``: one flat file, in TRL's style, for the command's options and the trainer's.

A key that is one of the command's options stands for it (``layer_size: 64`` is ``--layer-size 64``, and an option on
the command line wins). ``datasets``, ``held_out``, ``data_report`` and ``streaming`` (with ``held_out_pairs`` and
``remembered``) say what is trained on, ``use_peft`` and
``lora_*`` are TRL's names, and every other key is a field of
:class:`~rmcore.integrations.training.config.PairwiseRewardConfig`, so of transformers' ``TrainingArguments``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from rmcore._base.errors import InputError, reject
from rmcore._base.numbers import COUNT, Within, check_number
from rmcore.cli.console import reported_errors
from rmcore.cli.files import check_named_file

__all__ = ["RunSettings", "read_config", "run_settings"]

_KEY = "rmcore.train"
_LORA_NUMBERS = {"lora_r": COUNT, "lora_alpha": Within(above=0), "lora_dropout": Within(least=0, below=1)}
_LORA = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "lora_target_modules": "all-linear"}


@dataclass(frozen=True)
class RunSettings:
    """What a configuration says beside the command's options.

    Attributes:
        arguments: of the trainer.
        lora: of the adapters, None without.
        datasets: sources, where not a single one is named on the command line.
        held_out: share of the prompts that is not trained on.
        streaming: sources are read as they are trained on, for data that do not fit into memory.
        held_out_pairs: of a stream, how many of the held-out prompts' pairs are evaluated on.
        remembered: of a stream, among how many distinct pairs duplicates are looked for.
        data_report: a file for what was read, what was left out and why.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    datasets: Any = None
    held_out: float | None = None
    streaming: bool = False
    held_out_pairs: int = 1024
    remembered: int = 2_000_000
    data_report: Path | None = None


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """An eager option's callback: the file's options become the command's defaults, the rest is kept for later."""
    if path is None:
        return None
    with reported_errors():
        check_named_file("--config", path)
        values = _yaml(path)
    options = {p.name for p in context.command.params}
    own = {key.replace("-", "_"): value for key, value in values.items()}
    context.default_map = {**(context.default_map or {}), **{k: v for k, v in own.items() if k in options}}
    context.meta[_KEY] = {k: v for k, v in own.items() if k not in options}
    return path


def run_settings(context: typer.Context, given: list[str] | None) -> RunSettings:
    """Of the configuration, with ``--set name=value`` over it; raises InputError for a name there is not."""
    values = dict(context.meta.get(_KEY, {}))
    for one in given or []:
        name, equals, value = one.partition("=")
        if not equals or not name:
            reject("--set", repr(one), "name=value")
        values[name.strip().replace("-", "_")] = _scalar(value)
    datasets, held_out = values.pop("datasets", None), values.pop("held_out", None)
    if held_out is not None and (isinstance(held_out, bool) or not isinstance(held_out, (int, float))):
        reject("held_out", repr(held_out), "a share of the prompts")
    streaming = bool(values.pop("streaming", False))
    if streaming and (datasets is None or "max_steps" not in values):
        reject("streaming", True, "datasets and max_steps beside it")
    counts = {}
    for name, least in (("held_out_pairs", 1), ("remembered", 0)):
        if name in values:
            counts[name] = value = values.pop(name)
            if not streaming or isinstance(value, bool) or not isinstance(value, int) or value < least:
                reject(name, repr(value), f"at least {least}, with streaming: true")
    report = values.pop("data_report", None)
    if report is not None and not isinstance(report, str):
        reject("data_report", repr(report), "a file's name")
    use_lora = values.pop("use_peft", False)
    lora = {name: values.pop(name, default) for name, default in _LORA.items()}
    for name, within in _LORA_NUMBERS.items():
        check_number(name, lora[name], within)
    for name, value in values.items():  # the trainer would take nan, and train to nothing
        _check_finite(name, value)
    return RunSettings(
        values,
        lora if use_lora else None,
        datasets,
        held_out,
        streaming,
        data_report=None if report is None else Path(report),
        **counts,
    )


def _check_finite(name: str, value: object) -> None:
    if isinstance(value, float):
        check_number(name, value, Within())
    elif isinstance(value, dict):
        for key, part in value.items():
            _check_finite(f"{name}.{key}", part)
    elif isinstance(value, list):
        for k, part in enumerate(value):
            _check_finite(f"{name}[{k}]", part)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise InputError("--config: expected pyyaml to read it: pip install 'rmcore[train]'") from error
    try:
        text = path.read_text(encoding="utf-8")
        _check_once(yaml.compose(text, Loader=yaml.SafeLoader), str(path))
        found = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"--config: got {str(path)!r}, which cannot be read as YAML ({error})") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InputError(f"--config: got {str(path)!r} with no mapping of names to values")
    return found


def _check_once(root: Any, path: str) -> None:
    """Raise InputError for a name that comes twice in one mapping: YAML takes the last, and says nothing."""
    nodes, known = [root], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in known or getattr(node, "id", "") not in ("mapping", "sequence"):
            continue
        known.add(id(node))  # a node may be named, and stand in many places
        if node.id == "sequence":
            nodes += node.value
            continue
        names = [key.value for key, _ in node.value if key.id == "scalar"]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            reject("--config", f"{path!r} with {twice!r} twice", "each name once")
        nodes += [part for pair in node.value for part in pair]


def _scalar(text: str) -> Any:
    import yaml

    value = yaml.safe_load(text)
    try:
        return float(value) if isinstance(value, str) else value  # YAML 1.1 takes 1e-5 for a word
    except ValueError:
        return value
