"""Model folders as earlier versions wrote them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from rmcore._base.files import digest_file

__all__ = ["as_0_1_0_wrote_it"]


def as_0_1_0_wrote_it(folder: Path) -> None:
    """Take out of a folder of this version's what version 0.1.0 did not write: no digests, no row posterior."""
    file, described = folder / "head.safetensors", folder / "rmcore.json"
    save_file({name: t for name, t in load_file(file).items() if not name.startswith("row_")}, file)
    values = json.loads(described.read_text())
    for name in (
        *("digest", "backbone_files", "positions"),
        *("error_prior", "estimators", "uncertainty", "critiqued"),
    ):
        values.pop(name, None)
    values["head"].pop("rows", None)
    values["head"]["config"].pop("row_ridge", None)
    values["head"]["sha256"] = digest_file(file)
    for name in ("date", "family", "gguf_file", "split_special_tokens"):
        values.get("backbone", {}).pop(name, None)
    described.write_text(json.dumps(values))
