"""URM's published layout: ``score.weight`` (2A, h), the gate's ``weights.fc.{0,2,4}``, the body under ``model.``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rmcore._base.errors import CheckpointError, reject
from rmcore._base.files import atomic_folder
from rmcore.head.attributes.gating import GateConfig
from rmcore.head.attributes.head import HELPSTEER2, URM_WEIGHTS, AttributeConfig, AttributeHead

__all__ = ["published_tensors", "read_published", "write_published"]

FIXED, GATED = "LlamaForSequenceClassificationWithNormal", "LlamaForSequenceClassificationWithNormal_Weights"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_GATE = "weights.fc.{}"
_DEPTH = 2


def published_tensors(head: AttributeHead) -> dict[str, Tensor]:
    """The head's tensors by their published names.

    Raises InputError for a head that URM's layout cannot hold: its code knows HelpSteer2's five attributes as normals,
    either URM-LLaMa-3-8B's weights or a SELU gate of two hidden layers as wide as the states.
    """
    config, gate = head.config, head.gate
    if config.names != HELPSTEER2 or config.spread != "normal":
        reject("head", f"{config.spread}s of {list(config.names)}", f"normals of {list(HELPSTEER2)}")
    tensors = {"score.weight": head.value.weight.detach()}
    if gate is None:
        if config.weights != URM_WEIGHTS:
            reject("head", f"weights {config.weights}", f"{URM_WEIGHTS}: those are in URM's code, not in its files")
        return tensors
    widths = [layer.out_features for layer in gate.linear_layers[:-1]]
    if gate.config.kind != "selu" or widths != [config.hidden_size] * _DEPTH:
        reject("head", f"gate {gate.config.kind!r} of widths {widths}", f"'selu' of {_DEPTH} layers as wide as states")
    for k, layer in enumerate(gate.linear_layers):
        name = _GATE.format(2 * k)
        tensors |= {f"{name}.weight": layer.weight.detach(), f"{name}.bias": layer.bias.detach()}
    return tensors


def write_published(head: AttributeHead, base: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Write a model folder in URM's published layout: the body of ``base`` and the head.

    Args:
        head: see :func:`published_tensors`; stored in the body's dtype, as the authors do.
        base: folder with a Llama in safetensors, whose states the head was trained on, and its tokenizer.
        path: a new or empty folder, or one with a ``config.json`` to be replaced.

    Raises:
        InputError: a head that the layout cannot hold, or is not as wide as the body.
        CheckpointError: a base that is none.
    """
    from safetensors.torch import load_file, save_file

    base, found = Path(base), published_tensors(head)
    config = _config(base, head)
    shards = sorted(base.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"base: got {str(base)!r} without safetensors files")
    placed: dict[str, str] = {}
    with atomic_folder(path, marker="config.json") as folder:
        for file in base.iterdir():
            if file.is_file() and file.suffix in (".json", ".model", ".txt", ".jinja") and file.name != _INDEX:
                shutil.copy(file, folder / file.name)
        for k, shard in enumerate(shards):
            body = {_body_name(n): t for n, t in load_file(shard).items() if not n.startswith(("lm_head.", "score."))}
            if k == len(shards) - 1:
                dtype = next(iter(body.values())).dtype if body else torch.float32
                body |= {name: tensor.to("cpu", dtype).contiguous() for name, tensor in found.items()}
            name = _SINGLE if len(shards) == 1 else shard.name
            save_file(body, folder / name, {"format": "pt"})
            placed |= dict.fromkeys(body, name)
        if len(shards) > 1:
            (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_published(path: str | os.PathLike[str]) -> AttributeHead:
    """The head of a folder in URM's published layout, float32 on the CPU; the body stays on disk.

    Raises CheckpointError for another layout.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    try:
        for file in sorted(Path(path).glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                names = [name for name in opened.keys() if name.startswith(("score.", "weights."))]  # noqa: SIM118
                tensors |= {name: opened.get_tensor(name).float() for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"path: {path}: not readable as safetensors ({error})") from error
    return _assemble(tensors, str(path))


def _assemble(tensors: Mapping[str, Tensor], path: str) -> AttributeHead:
    score = tensors.get("score.weight")
    if score is None or score.dim() != 2 or score.shape[0] != 2 * len(HELPSTEER2):
        got = None if score is None else tuple(score.shape)
        raise CheckpointError(f"path: {path}: score.weight: got {got}, expected ({2 * len(HELPSTEER2)}, h)")
    gated = len(tensors) > 1
    config = AttributeConfig(
        int(score.shape[1]), weights=None if gated else URM_WEIGHTS, gate=GateConfig("selu") if gated else None
    )
    head = AttributeHead(config)
    wanted = published_tensors(head)
    if {n: t.shape for n, t in wanted.items()} != {n: t.shape for n, t in tensors.items()}:
        raise CheckpointError(f"path: {path}: got tensors {sorted(tensors)}, expected URM's {sorted(wanted)}")
    with torch.no_grad():
        for name, place in wanted.items():
            place.copy_(tensors[name])
    return head.eval()


def _config(base: Path, head: AttributeHead) -> dict[str, object]:
    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        model_type, width = config["model_type"], config["hidden_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"base: {base}: got no readable config.json of a body ({error!r})") from error
    if model_type != "llama":
        raise CheckpointError(f"base: got model_type {model_type!r}, expected 'llama', which URM's layout is of")
    if width != head.config.hidden_size:
        reject("head", f"width {head.config.hidden_size}", f"{width}, the body's")
    labels = {str(k): name for k, name in enumerate(HELPSTEER2)}
    architecture = FIXED if head.gate is None else GATED
    return {**config, "architectures": [architecture], "id2label": labels}


def _body_name(name: str) -> str:
    return name if name.startswith("model.") else f"model.{name}"
