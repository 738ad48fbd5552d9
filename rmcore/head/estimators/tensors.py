"""An estimator's tensors on disk: one file of safetensors whose digest its JSON values hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rmcore._base.errors import CheckpointError
from rmcore._base.files import digest_file

__all__ = ["read_tensors", "write_tensors"]

TENSOR_FILE = "estimator.safetensors"


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write the file; returns the JSON values by which :func:`read_tensors` knows it."""
    from safetensors.torch import save_file

    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSOR_FILE)
    return {"sha256": digest_file(folder / TENSOR_FILE)}


def read_tensors(folder: Path, values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Tensor]:
    """Read it; raises CheckpointError for a missing or altered file, and for other tensors than ``names``."""
    from safetensors.torch import load_file

    file = folder / TENSOR_FILE
    if not file.is_file():
        raise CheckpointError(f"{file}: got no such file, expected an estimator's tensors")
    if digest_file(file) != values.get("sha256"):
        raise CheckpointError(f"{file}: got other bytes than were written, expected the sha256 beside it")
    tensors = load_file(file)
    if sorted(tensors) != sorted(names):
        raise CheckpointError(f"{file}: got tensors {sorted(tensors)}, expected {sorted(names)}")
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{file}: {name}: got NaN or Inf, expected finite values")
    return {name: tensor.clone() for name, tensor in tensors.items()}  # aligned, so that products have the same bits
