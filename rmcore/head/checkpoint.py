"""Heads and models on disk: a folder of safetensors and JSON, written atomically, checked when read. No pickle.

``rmcore.json`` says what the folder is (format version, configurations, scalars, the tensor file's sha256);
``head.safetensors`` holds the serving weights bit for bit and, unless left out, the posterior's Σ w φφᵀ; in difference
mode both again for the row posterior, their names beginning with ``row_`` (heads saved before there was one lack them);
``backbone/`` holds an embedded backbone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmcore._base.errors import CheckpointError, InputError, reject
from rmcore._base.files import atomic_folder, digest_file
from rmcore._base.json_members import unique_members
from rmcore._base.version import __version__
from rmcore.head.config import HeadConfig
from rmcore.head.frozen import FrozenHead
from rmcore.head.posterior import Posterior
from rmcore.head.rows import RowPosterior
from rmcore.ops import reference
from rmcore.ops.reference import TILE
from rmcore.ops.weights import SERVING_DTYPES, FeatureMap, HeadWeights

__all__ = [
    "CONFIG_FILE",
    "FORMAT_VERSION",
    "check_digest",
    "head_of_state",
    "head_state",
    "load_head",
    "read_config",
    "row_posterior",
    "row_tensors",
    "save_head",
    "write_head",
]

CONFIG_FILE = "rmcore.json"
TENSOR_FILE = "head.safetensors"
FORMAT = "rmcore"
FORMAT_VERSION = 1

_ROW = "row_"
_DTYPES = {str(d).removeprefix("torch."): d for d in SERVING_DTYPES}


def save_head(head: FrozenHead, path: str | os.PathLike[str], *, include_posterior: bool = True) -> None:
    """Write a head as a folder of its own. ``include_posterior`` keeps it able to learn; it costs 4·D² bytes."""
    with atomic_folder(path, marker=CONFIG_FILE) as folder:
        write_config(folder, {"kind": "head", "head": write_head(head, folder, include_posterior=include_posterior)})


def load_head(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> FrozenHead:
    """Read a head from a folder written by :func:`save_head` or by a model.

    Raises CheckpointError for a truncated, altered, foreign or newer file, or one whose parts do not fit together.
    """
    config = read_config(path)
    head = read_head(Path(path), config.get("head"), device)
    check_digest(path, config)
    return head


def write_config(folder: Path, values: dict[str, Any]) -> None:
    """Write ``rmcore.json`` with the format's own fields in front."""
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, "rmcore_version": __version__, **values}
    document["digest"] = _digest(document)
    (folder / CONFIG_FILE).write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check ``rmcore.json``."""
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"path: got {str(path)!r}, expected a folder with {CONFIG_FILE}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique_members)
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{file}: got a file of another program, expected format {FORMAT!r}")
    if values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: got format_version {values.get('format_version')!r}, this rmcore ({__version__}) reads "
            f"{FORMAT_VERSION}. Use the rmcore that wrote it ({values.get('rmcore_version')})"
        )
    return values


def check_digest(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Raise CheckpointError where ``values`` fit together and are not those that were saved.

    Folders of 0.1.0 have no digest; where there is anything that only later versions write, it is one that was lost.

    Called last, since what does not fit is told better by what it does not fit.
    """
    file = Path(path) / CONFIG_FILE
    if "digest" not in values:
        later = _later_key(values)
        if later is not None:
            raise CheckpointError(
                f"{file}: got no digest beside {later!r}, which only versions write that write a digest too: the file "
                "is damaged, or was edited. Copy it again"
            )
    elif values["digest"] not in (_digest(values), _digest(values, commit=False)):  # earlier ones are without it
        raise CheckpointError(
            f"{file}: got values of the head, or of how texts become its input, that differ from "
            "those saved by the digest beside them. Copy the file again; limits on length are options of loading"
        )


_SINCE_0_1_0 = {
    "": ("backbone_files", "error_prior", "estimators", "uncertainty", "critiqued", "positions", "attributes"),
    "head": ("rows",),
    "head.config": ("row_ridge", "order_mean"),
    "backbone": ("date", "family", "gguf_file", "split_special_tokens"),
}
"""Keys that version 0.1.0 did not write, by the section they are in."""


def _later_key(values: Mapping[str, Any]) -> str | None:
    """The first of these that there is."""
    for place, names in _SINCE_0_1_0.items():
        section: Any = values
        for part in filter(None, place.split(".")):
            section = section.get(part) if isinstance(section, Mapping) else None
        found = next((name for name in names if isinstance(section, Mapping) and name in section), None)
        if found is not None:
            return ".".join(filter(None, (place, found)))
    return None


def _digest(values: Mapping[str, Any], *, commit: bool = True) -> str:
    """sha256 of what of ``rmcore.json`` decides scores: not where the backbone is, nor its limits on length, but which
    of the hub's commits it is, unless its files are told.
    """
    backbone = values.get("backbone")
    free = {"name", "revision", "max_length", "overlong"}
    if commit and not values.get("backbone_files"):
        free.remove("revision")
    if isinstance(backbone, Mapping):
        backbone = {name: value for name, value in backbone.items() if name not in free}
    decides = [values.get("kind"), values.get("head"), backbone, values.get("embedded"), values.get("backbone_files")]
    # Without these: the digest that folders had before there were any.
    beside = [values[name] for name in ("estimators", "uncertainty", "critiqued") if name in values]
    text = json.dumps([*decides, values.get("error_prior"), *beside], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def write_head(head: FrozenHead, folder: Path, *, include_posterior: bool = True) -> dict[str, Any]:
    """Write ``head.safetensors`` into ``folder``; returns the JSON values that go with it."""
    from safetensors.torch import save_file

    tensors, values = head_state(head, include_posterior=include_posterior)
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / TENSOR_FILE)
    return {**values, "sha256": digest_file(folder / TENSOR_FILE)}


def head_state(head: FrozenHead, *, include_posterior: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A head as tensors, bit for bit, and JSON values; :func:`head_of_state` is the inverse."""
    weights, feature_map = head.weights, head.feature_map
    tensors = {
        **feature_map.tensors(),
        "beta": head.beta,
        **weights.stored_tensors(),
    }
    posterior = head.posterior if include_posterior else None
    if posterior is not None:
        tensors["gram"] = reference.pack_lower(posterior.gram, TILE)
    rows = None
    if head.rows is not None:
        tensors |= row_tensors(head.rows, include_posterior=include_posterior)
        count = head.rows.count if include_posterior else None
        rows = {"prior": head.rows.prior, "factor_scale": head.rows.weights.factor_scale, "count": count}
    return tensors, {
        "config": head.config.to_dict(),
        "dtype": str(head.dtype).removeprefix("torch."),
        "beta0": head.beta0,
        "input_scale": feature_map.input_scale,
        "feature_scale": feature_map.feature_scale,
        "factor_scale": weights.factor_scale,
        "posterior": None if posterior is None else {"count": posterior.count},
        **({} if rows is None else {"rows": rows}),
    }


def read_head(folder: Path, values: object, device: torch.device | str) -> FrozenHead:
    """Build the head described by ``values`` from ``folder``'s tensors, checking everything."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / TENSOR_FILE
    if not isinstance(values, dict):
        raise CheckpointError(f"{folder / CONFIG_FILE}: got no 'head' section")
    if not file.is_file():
        raise CheckpointError(f"{file}: missing")
    if digest_file(file) != values.get("sha256"):
        raise CheckpointError(
            f"{file}: got contents that differ from the sha256 in {CONFIG_FILE}: the file is truncated, altered, or "
            "from another save. Copy the folder again"
        )
    try:
        tensors = load_file(file, device=str(device))
        return head_of_state(tensors, values, str(file))
    except (SafetensorError, InputError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: got a head that does not fit together ({error})") from error


def head_of_state(tensors: dict[str, Tensor], values: dict[str, Any], file: str = "head") -> FrozenHead:
    """The head of a :func:`head_state`; ``file`` is what messages call it.

    Raises CheckpointError where its parts do not fit together, or InputError, KeyError, TypeError or ValueError.
    """
    config, dtype = HeadConfig.from_dict(values["config"]), _DTYPES[values["dtype"]]
    _check_tensors(tensors, _wanted_tensors(config, dtype, values, shifted="hidden_shift" in tensors), file)
    feature_map = FeatureMap(
        features=config.features,
        projection=tensors.get("projection"),
        phase=tensors.get("phase"),
        layer_weight=tensors.get("layer_weight"),
        layer_bias=tensors.get("layer_bias"),
        activation=config.activation,
        layernorm=config.layernorm,
        hidden_size=config.hidden_size,
        num_features=config.num_features,
        dtype=dtype,
        input_scale=_scalar(values, "input_scale", positive=True),
        feature_scale=_scalar(values, "feature_scale", positive=True),
        projection_scale=tensors.get("projection_scale"),
        hidden_shift=tensors.get("hidden_shift"),
        hidden_scale=tensors.get("hidden_scale"),
    )
    weights = HeadWeights(
        map=feature_map,
        beta=tensors["serving_beta"],
        beta0=_scalar(values, "beta0"),
        factor=tensors["factor"],
        factor_scale=_scalar(values, "factor_scale", positive=True),
        amplitude=config.resolved_amplitude,
        factor_row_scale=tensors.get("factor_row_scale"),
        factor_diagonal=tensors.get("factor_diagonal"),
    )
    posterior = None
    if "gram" in tensors:
        posterior = Posterior.from_gram(
            reference.unpack_lower(tensors["gram"], config.num_features),
            int(values["posterior"]["count"]),
            ridge=config.ridge,
            likelihood=config.likelihood,
        )
    rows = values.get("rows")
    known = None if rows is None else _read_rows(config, weights, rows, tensors)
    return FrozenHead(config, feature_map, tensors["beta"], weights.beta0, posterior, weights, known)


def _wanted_tensors(
    config: HeadConfig, dtype: torch.dtype, values: dict[str, Any], *, shifted: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor of such a head; ``shifted``: its int8 rows are moved before rounding."""
    h, m, d = config.hidden_size, config.layer_size, config.num_features
    tiles = -(-d // TILE)
    lower = (tiles * (tiles + 1) // 2, TILE, TILE)
    folds = m is None or (config.activation == "none" and not config.layernorm)
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "beta": ((d,), torch.float64),
        "serving_beta": ((d,), torch.float32),
        "factor": (lower, dtype),
    }
    if config.features == "rff" or m is not None:
        wanted["projection"] = ((d, h if folds or m is None else m), dtype)
        wanted["phase"] = ((d,), torch.float32)
    if not folds and m is not None:
        wanted["layer_weight"], wanted["layer_bias"] = ((m, h), dtype), ((m,), torch.float32)
    if dtype == torch.int8:
        for name in ("projection_scale", "factor_row_scale", "factor_diagonal"):
            wanted[name] = ((d,), torch.float32)
        if shifted:
            wanted["hidden_shift"] = wanted["hidden_scale"] = ((h,), torch.float32)
    if values["posterior"] is not None:
        wanted["gram"] = (lower, torch.float64)
    rows = values.get("rows")
    if rows is not None:
        factor = ("factor", "factor_row_scale", "factor_diagonal")
        wanted |= {_ROW + name: wanted[name] for name in factor if name in wanted}
        if rows["count"] is not None:
            wanted[_ROW + "gram"] = (lower, torch.float64)
    return wanted


def _check_tensors(
    tensors: dict[str, Tensor], wanted: dict[str, tuple[tuple[int, ...], torch.dtype]], file: str
) -> None:
    """Raises CheckpointError for one that is missing, too many, of another shape or dtype, or not finite."""
    if set(tensors) != set(wanted):
        raise CheckpointError(f"{file}: got tensors {sorted(tensors)}, expected {sorted(wanted)}")
    for name, (shape, kind) in wanted.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != kind:
            raise CheckpointError(f"{file}: {name}: got {tuple(tensor.shape)} {tensor.dtype}, expected {shape} {kind}")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{file}: {name}: got NaN or Inf, expected finite values")


def row_tensors(rows: RowPosterior, *, include_posterior: bool = True) -> dict[str, Tensor]:
    """A row posterior's tensors by their names on disk."""
    stored = rows.weights.stored_tensors()
    del stored["serving_beta"]  # zeros
    if rows.posterior is not None and include_posterior:
        stored["gram"] = reference.pack_lower(rows.posterior.gram, TILE)
    return {_ROW + name: tensor for name, tensor in stored.items()}


def _read_rows(
    config: HeadConfig, weights: HeadWeights, values: dict[str, Any], tensors: dict[str, Tensor]
) -> RowPosterior:
    if config.row_ridge is None:
        reject("rows", "a row posterior", "none, since row_ridge is None")
    prior, scale = (_scalar(values, name, positive=True) for name in ("prior", "factor_scale"))
    count = None if values["count"] is None else int(values["count"])
    return row_posterior(weights, tensors, config.row_ridge, prior=prior, factor_scale=scale, count=count)


def row_posterior(
    weights: HeadWeights,
    tensors: Mapping[str, Tensor],
    ridge: float,
    *,
    prior: float,
    factor_scale: float,
    count: int | None,
) -> RowPosterior:
    """The inverse of :func:`row_tensors`, for the head that serves with ``weights``."""
    stored = {name.removeprefix(_ROW): tensor for name, tensor in tensors.items() if name.startswith(_ROW)}
    stored["serving_beta"] = torch.zeros_like(weights.beta)
    serving = replace(weights.with_stored(stored, factor_scale), beta0=0.0, amplitude=0.0)
    posterior = None
    if count is not None:
        gram = reference.unpack_lower(stored["gram"], weights.num_features)
        posterior = Posterior.from_gram(gram, count, ridge=ridge * prior, likelihood="gaussian")
    return RowPosterior(weights.map, prior, posterior, serving)


def _scalar(values: dict[str, Any], name: str, *, positive: bool = False) -> float:
    value = float(values[name])
    if not math.isfinite(value) or (positive and value <= 0):
        reject(name, value, "a positive finite number" if positive else "a finite number")
    return value
