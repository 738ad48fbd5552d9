"""What a model's folder says of it by itself, so that what it cannot have is refused before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmcore.head.checkpoint import CONFIG_FILE, read_config
from rmcore.model.hub import files_of

__all__ = ["Described", "describe"]


@dataclass(frozen=True, slots=True)
class Described:
    """Read from a model's JSON; ``None`` is what that does not say.

    Attributes:
        features: of its head.
        mode: of its pairs.
        estimators: fitted beside the head, by name.
        uncertainty: which of these it is served with; None for its head.
        novelty: whether there is a row posterior.
        spread: whether the head may tell what is in the answers themselves, as a published model's attributes do.
        positions: at most so many tokens has a text.
    """

    features: str
    mode: str | None
    estimators: tuple[str, ...] = ()
    uncertainty: str | None = None
    novelty: bool = False
    spread: bool = False
    positions: int | None = None


def describe(name: str) -> Described | None:
    """A folder, or a model on the hub, of which nothing but its JSON is fetched.

    None where it does not describe a model: loading it says what is wrong.

    Raises CheckpointError where there is no such folder or repository, or ``rmcore.json`` cannot be read.
    """
    hub = {"cache_dir": None, "local_files_only": False}
    file = files_of(name, None, hub, expected=f"a folder with {CONFIG_FILE}")
    ours = file(CONFIG_FILE)
    if ours is None:
        published = file("config.json")
        if published is None:
            return None
        return Described("linear", None, spread=True, positions=_positions(published))
    values = read_config(ours.parent)
    head, backbone, beside = (_section(values.get(part)) for part in ("head", "backbone", "estimators"))
    config = _section(head.get("config"))
    if not {"features", "mode"} <= config.keys():
        return None
    served = values.get("uncertainty")
    return Described(
        features=str(config["features"]),
        mode=str(config["mode"]),
        estimators=tuple(beside),
        uncertainty=served if isinstance(served, str) else None,
        novelty="rows" in head,
        spread=backbone.get("kind") == "reward",
        positions=_recorded(values, backbone, ours.parent),
    )


def _recorded(values: Mapping[str, Any], backbone: Mapping[str, Any], folder: Path) -> int | None:
    """Of the model's own folder, or else of its backbone's where that is a folder."""
    known = values.get("positions")
    if isinstance(known, int):
        return known
    own, name = values.get("embedded"), backbone.get("name")
    if not own and not (isinstance(name, str) and name):
        return None  # from a server, or nothing that can be looked at
    return _positions((folder / "backbone" if own else Path(str(name)).expanduser()) / "config.json")


def _positions(file: Path) -> int | None:
    """At most so many; of some architectures the true number is a little less, which the loaded model knows."""
    try:
        values = _section(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None
    found = [_section(part).get("max_position_embeddings") for part in (values.get("text_config"), values)]
    return next((most for most in found if isinstance(most, int) and not isinstance(most, bool) and most > 0), None)


def _section(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
