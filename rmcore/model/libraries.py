"""Which further library a checkpoint needs, said before anything is read of it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from rmcore._base.errors import CheckpointError

__all__ = ["FileOf", "check_quantised", "is_classifier_adapter", "require_libraries"]

FileOf: TypeAlias = Callable[[str], Path | None]
"""The local path of one of a checkpoint's files, by name; None where it has no such file."""

_ACCELERATE = ("accelerate", "accelerate")
_GPTQMODEL = ("gptqmodel", "gptqmodel")
_NEEDED: dict[str, tuple[tuple[str, str], ...]] = {
    "aqlm": (("aqlm", "aqlm"), _ACCELERATE),
    "auto-round": (("auto_round", "auto-round"),),
    "awq": (_GPTQMODEL, _ACCELERATE),
    "bitsandbytes": (("bitsandbytes", "bitsandbytes"), _ACCELERATE),
    "compressed-tensors": (("compressed_tensors", "compressed-tensors"),),
    "eetq": (("kernels", "kernels"), _ACCELERATE),
    "fbgemm_fp8": (("fbgemm_gpu", "fbgemm-gpu"), _ACCELERATE),
    "fp8": (_ACCELERATE,),
    "gguf": (("gguf", "gguf"),),
    "gptq": (_GPTQMODEL, ("optimum", "optimum")),
    "hqq": (("hqq", "hqq"),),
    "mxfp4": (("kernels", "kernels"), ("triton", "triton"), _ACCELERATE),
    "quanto": (("optimum", "optimum-quanto"), _ACCELERATE),
    "torchao": (("torchao", "torchao"),),
    "vptq": (("vptq", "vptq"), _ACCELERATE),
}
"""transformers' ``quant_method``: what must be importable, and what to install. Of others transformers says it."""

_EXTRAS = {"bitsandbytes": "quantised", "compressed-tensors": "quantised", "fp8": "quantised", "gguf": "quantised"}


def require_libraries(name: str, file: FileOf, *, gguf: bool = False) -> None:
    """Raise CheckpointError, naming the library, where a checkpoint needs one that is not installed.

    Adapters need peft. Quantised weights need the libraries of their method, by ``quantization_config`` in config.json.
    A method that transformers does not know is an error too.

    Args:
        name: folder or hub name, for messages.
        file: its files.
        gguf: whether weights are read from a GGUF file.
    """
    if file("adapter_config.json") is not None and importlib.util.find_spec("peft") is None:
        raise CheckpointError(
            f"backbone: got {name!r}, a PEFT adapter, expected peft to load it: pip install peft (or 'rmcore[peft]')"
        )
    found = _json(file("config.json")).get("quantization_config")
    given = found.get("quant_method") if isinstance(found, dict) else None
    if given is None and isinstance(found, dict) and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        given = "bitsandbytes"  # as transformers reads the configurations of its first releases
    method = "gguf" if gguf else str(given)
    if given is not None and not _known(method):  # transformers would warn, and take the weights as they are
        raise CheckpointError(
            f"backbone: got {name!r}, whose weights are quantised by {method}, expected a method that transformers "
            "knows"
        )
    missing = [package for module, package in _NEEDED.get(method, ()) if importlib.util.find_spec(module) is None]
    if missing:
        extra = f" (or 'rmcore[{_EXTRAS[method]}]')" if method in _EXTRAS else ""
        raise CheckpointError(
            f"backbone: got {name!r}, whose weights are quantised by {method}, expected {' and '.join(missing)} to "
            f"load them: pip install {' '.join(missing)}{extra}"
        )


def check_quantised(name: str, model: Any) -> None:
    """Raise CheckpointError where layers of bitsandbytes hold floats: nothing can be computed with these.

    They do where config.json has a ``quantization_config`` and the file's weights are not quantised: transformers
    leaves that to a device that it places the model on.
    """
    for layer, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__ not in ("Linear4bit", "Linear8bitLt") or weight is None:
            continue
        # 4 bits may be stored in floats, packed into one column
        if weight.is_floating_point() and tuple(weight.shape) == (module.out_features, module.in_features):
            raise CheckpointError(
                f"backbone: got {name!r}, whose quantization_config says bitsandbytes and whose {layer}.weight is "
                f"{str(weight.dtype).removeprefix('torch.')}, not quantised. Expected "
                "weights that bitsandbytes has quantised (transformers' from_pretrained with device_map, then "
                "save_pretrained), or no quantization_config in config.json, which loads them as they are"
            )


def is_classifier_adapter(name: str, file: FileOf) -> bool:
    """Whether a checkpoint is a PEFT adapter and no model, trained for classification (``SEQ_CLS``).

    Raises CheckpointError for an adapter of another task, which has no head.
    """
    path = file("adapter_config.json")
    if path is None or file("config.json") is not None:
        return False
    try:
        task = json.loads(path.read_text(encoding="utf-8")).get("task_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"backbone: got {str(path)!r}, which is no adapter's configuration ({error})") from error
    if task != "SEQ_CLS":
        raise CheckpointError(f"backbone: got {name!r}, an adapter for {task}, expected one for SEQ_CLS, with a head")
    return True


def _known(method: str) -> bool:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    return any(known == method or known.startswith(f"{method}_") for known in AUTO_QUANTIZER_MAPPING)


def _json(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever reads the folder says what is wrong with it
        return {}
    return values if isinstance(values, dict) else {}
