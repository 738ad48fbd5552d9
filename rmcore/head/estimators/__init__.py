"""Other uncertainties behind one door (design 6): by name, from cached states, saved and loaded.

:data:`ESTIMATORS` has what there is. Each is fitted by ``fit(hidden, labels, pairs)``, and is a
:class:`~rmcore.head.estimators.protocol.PairEstimator`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from rmcore._base.errors import CheckpointError, InputError, reject
from rmcore._base.files import atomic_folder, digest_file
from rmcore._base.json_members import unique_members
from rmcore._base.version import __version__
from rmcore.head.estimators.attributes import URM, URME, AttributeLabels
from rmcore.head.estimators.combined import SNGPWithURM
from rmcore.head.estimators.dropout import Dropout
from rmcore.head.estimators.ensembles import Ensemble
from rmcore.head.estimators.laplace import Laplace, LaplaceDiagonal, LaplaceKronecker
from rmcore.head.estimators.protocol import PairEstimate, PairEstimator, VarianceKind, check_part, of_kind
from rmcore.head.estimators.sngp import SNGP

__all__ = [
    "ESTIMATORS",
    "SNGP",
    "URM",
    "URME",
    "AnyEstimator",
    "AttributeLabels",
    "Dropout",
    "Ensemble",
    "Laplace",
    "LaplaceDiagonal",
    "LaplaceKronecker",
    "PairEstimate",
    "PairEstimator",
    "SNGPWithURM",
    "VarianceKind",
    "check_part",
    "estimator_named",
    "load_estimator",
    "of_kind",
    "read_estimators",
    "save_estimator",
    "write_estimators",
]

AnyEstimator: TypeAlias = SNGP | Laplace | Dropout | Ensemble | URM | URME | SNGPWithURM

_KINDS: tuple[type[AnyEstimator], ...] = (
    *(SNGP, Laplace, LaplaceKronecker, LaplaceDiagonal, Dropout, Ensemble),
    *(URM, URME, SNGPWithURM),
)
ESTIMATORS: dict[str, type[AnyEstimator]] = {kind.name: kind for kind in _KINDS}
"""Name → class."""

_FILE = "estimator.json"
_FORMAT = "rmcore-estimator"
_VERSION = 1


def estimator_named(name: str) -> type[AnyEstimator]:
    """The class of a name; raises InputError with the names there are."""
    if name not in ESTIMATORS:
        reject("uncertainty", repr(name)[:60], f"one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]


def save_estimator(estimator: PairEstimator, path: str | os.PathLike[str]) -> None:
    """Write an estimator as a folder of its own, atomically: safetensors and JSON."""
    with atomic_folder(path, marker=_FILE) as folder:
        values = {
            "format": _FORMAT,
            "format_version": _VERSION,
            "rmcore_version": __version__,
            "estimator": estimator.name,
            "kind": estimator.kind,
            **estimator.write(folder),
        }
        (folder / _FILE).write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def load_estimator(path: str | os.PathLike[str]) -> AnyEstimator:
    """Read one. Raises CheckpointError for a truncated, altered, foreign or newer folder."""
    from safetensors import SafetensorError  # kept out of `import rmcore`

    file = Path(path) / _FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique_members)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(values, dict) or (values.get("format"), values.get("format_version")) != (_FORMAT, _VERSION):
        raise CheckpointError(f"{file}: got another format, expected {_FORMAT} {_VERSION}, which this rmcore reads")
    try:
        return estimator_named(str(values.get("estimator"))).read(Path(path), values)
    except (SafetensorError, InputError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: got values that do not fit together ({error})") from error


def write_estimators(estimators: Mapping[str, PairEstimator], folder: Path) -> dict[str, str]:
    """Write a model's estimators as ``estimators/NAME`` of its folder; returns their digests, for its JSON."""
    for name, estimator in estimators.items():
        save_estimator(estimator, _of_model(folder, name))
    return {name: digest_file(_of_model(folder, name) / _FILE) for name in estimators}


def read_estimators(folder: Path, digests: Mapping[str, str]) -> dict[str, PairEstimator]:
    """The inverse of :func:`write_estimators`; raises CheckpointError as :func:`load_estimator`, and for others."""
    found: dict[str, PairEstimator] = {}
    for name, digest in digests.items():
        file = _of_model(folder, estimator_named(name).name) / _FILE
        if not file.is_file() or digest_file(file) != digest:
            raise CheckpointError(f"{file}: got none, or another than the model was saved with. Copy the folder again")
        found[name] = load_estimator(file.parent)
    return found


def _of_model(folder: Path, name: str) -> Path:
    return folder / "estimators" / name
