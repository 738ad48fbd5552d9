"""Which family a model is of, by its configuration and its tensors' names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from fnmatch import fnmatch, fnmatchcase
from typing import Any

from rmcore._base.errors import CheckpointError
from rmcore.model.families.registry import CLASSIFIER, FAMILIES, TWO_LABELS
from rmcore.model.families.spec import Family
from rmcore.model.families.tensors import TensorFiles
from rmcore.model.loading import UNREAD_TENSORS

__all__ = ["check_config", "detect", "leftover"]

log = logging.getLogger(__name__)

# Words of configuration keys that tend to say how a score is made. A key with one of them that neither the family nor
# the body's configuration class knows is refused: to ignore it would be to guess that it changes nothing.
_TELLING = frozenset(
    (
        *("activation", "bias", "calibration", "clip", "gate", "gating", "head", "heads", "logit", "mean"),
        *("multiplier", "normalize", "normalizer", "normalization", "objectives", "offset", "pooler", "pooling"),
        *("quantiles", "reward", "score", "scores", "shift", "sigmoid", "softmax", "std", "temperature", "value"),
        *("var", "vhead"),
    )
)
_HARMLESS = frozenset(("id2label", "label2id", "num_labels", "problem_type", "num_key_value_heads", "head_dim"))
_SHOWN = 6


def detect(name: str, config: Mapping[str, Any], files: TensorFiles) -> Family | None:
    """The family of a model, or None for one that is of none.

    A configuration key of one family alone decides, then the architecture, then the tensors' names.

    Args:
        name: folder or hub name.
        config: ``config.json``.
        files: its tensors.

    Raises CheckpointError for a classifier whose outputs are no reward.
    """
    architectures = [str(item) for item in config.get("architectures") or ()]
    own = name.rstrip("/").rpartition("/")[2].lower()
    special = [family for family in FAMILIES if family not in (CLASSIFIER, TWO_LABELS)]
    for family in special:
        if any(fnmatchcase(own, pattern) for pattern in family.repositories) and "score.weight" not in files:
            return family
    for family in special:
        if any(_has(config, key) for key in family.keys):
            return family
    for family in special:
        if any(fnmatchcase(a, pattern) for a in architectures for pattern in family.architectures):
            return family
    for family in special:
        body = not family.model_types or config.get("model_type") in family.model_types
        if family.tensors and body and all(tensor in files for tensor in family.tensors):
            return family
    if any(fnmatchcase(a, pattern) for a in architectures for pattern in CLASSIFIER.architectures):
        return _classifier(name, config)
    return None


def _has(config: Mapping[str, Any], key: str) -> bool:
    name, given, value = key.partition("=")
    return name in config and (not given or str(config[name]) == value)


def _classifier(name: str, config: Mapping[str, Any]) -> Family | None:
    model_type = str(config.get("model_type"))
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as KNOWN

    if model_type not in KNOWN:
        return None
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else int(config.get("num_labels", 2))
    if count == 1:
        return CLASSIFIER
    told = list(labels.values()) if isinstance(labels, Mapping) else []
    named = told and told != [f"LABEL_{k}" for k in range(count)]
    if count == 2 and not named and config.get("problem_type") in (None, "regression"):
        log.warning(
            "%s: two outputs without names, as TRL saved reward models for a while: its score is their mean, since one "
            "loss trained both. If it tells two classes apart, it is no reward model",
            name,
        )
        return TWO_LABELS
    what = f" called {', '.join(map(str, told[:_SHOWN]))}" if named else ""
    raise CheckpointError(
        f"backbone: got {name!r}, a classifier with {count} outputs{what}, expected a reward model. "
        "`rmcore families` lists the formats there are; family= names one"
    )


def check_config(values: Mapping[str, Any], body: Any, family: Family) -> None:
    """Refuse configuration keys that may say how a score is made and that nobody here reads.

    Args:
        values: ``config.json``.
        body: the body's configuration, an object of transformers.
        family: what the model is taken for.

    Raises CheckpointError, which names the key.
    """
    for key, _, wanted in (item.partition("=") for item in family.keys):
        if wanted and key in values and str(values[key]) != wanted:
            raise CheckpointError(f"config.json: got {key!r}: {values[key]!r}, family {family.name!r} has {wanted!r}")
    known = {*_HARMLESS, *type(body)().to_dict(), *(getattr(body, "attribute_map", None) or {}), *family.read_keys}
    for key in values:
        words = set(key.lower().split("_"))
        if key not in known and words & _TELLING and values[key] not in (None, False):
            raise CheckpointError(
                f"config.json: got {key!r}: {values[key]!r}, which may change scores and which family {family.name!r} "
                "does not know. Name another with family=, or run the model's own code with trust_remote_code=True"
            )


def leftover(names: list[str], used: set[str], family: Family) -> None:
    """Raise CheckpointError, naming them, where tensors are left over: a part of the model that nobody computes."""
    patterns = (*family.ignored, *UNREAD_TENSORS[:-1])
    left = [n for n in names if n not in used and not any(fnmatch(n, pattern) for pattern in patterns)]
    if left:
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        raise CheckpointError(
            f"backbone: got tensors that family {family.name!r} has no use for: {', '.join(left[:_SHOWN])}{more}. "
            "Something of this model would not be computed; name another family with family="
        )
