"""Which further library a checkpoint needs, said before anything is read of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from rmcore._base.errors import CheckpointError

__all__ = ["is_classifier_adapter", "require_libraries"]

_QUANTISED = {
    "aqlm": ("aqlm", "aqlm"),
    "awq": ("gptqmodel", "gptqmodel"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "eetq": ("eetq", "eetq"),
    "gptq": ("gptqmodel", "gptqmodel"),
    "hqq": ("hqq", "hqq"),
    "quanto": ("optimum", "optimum-quanto"),
    "torchao": ("torchao", "torchao"),
}
"""transformers' ``quant_method``: what must be importable, and what to install."""


def require_libraries(folder: Path) -> None:
    """Raise CheckpointError, naming the library, where a folder's checkpoint needs one that is not installed.

    Adapters need peft. Quantised weights need the library of their method, by ``quantization_config`` in config.json.
    """
    if (folder / "adapter_config.json").is_file() and importlib.util.find_spec("peft") is None:
        raise CheckpointError(
            f"backbone: got {str(folder)!r}, a PEFT adapter, expected peft to load it: pip install peft"
        )
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever reads the folder says what is wrong with it
        return
    found = values.get("quantization_config") if isinstance(values, dict) else None
    method = found.get("quant_method") if isinstance(found, dict) else None
    module, package = _QUANTISED.get(str(method), ("", ""))
    if module and importlib.util.find_spec(module) is None:
        raise CheckpointError(
            f"backbone: got {str(folder)!r}, whose weights are quantised by {method}, expected {package} to load them: "
            f"pip install {package}"
        )


def is_classifier_adapter(name: str) -> bool:
    """Whether a name is a folder with a PEFT adapter and no model, trained for classification (``SEQ_CLS``).

    Raises CheckpointError for an adapter of another task, which has no head.
    """
    file = Path(name) / "adapter_config.json"
    if not file.is_file() or (file.parent / "config.json").is_file():
        return False
    try:
        task = json.loads(file.read_text(encoding="utf-8")).get("task_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"backbone: got {str(file)!r}, which is no adapter's configuration ({error})") from error
    if task != "SEQ_CLS":
        raise CheckpointError(f"backbone: got {name!r}, an adapter for {task}, expected one for SEQ_CLS, with a head")
    return True
