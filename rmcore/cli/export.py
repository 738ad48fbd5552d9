"""``rmcore export``: a model of attributes in a published layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rmcore.cli import options
from rmcore.cli.checks import check_device, check_model_folder
from rmcore.cli.console import notes, reported_errors
from rmcore.cli.numbers import number

__all__ = ["export"]


def export(
    model: Annotated[str, typer.Argument(help="A folder written by rmcore train --attributes, or a hub name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")],
    member: Annotated[int | None, number(help="Which head of an ensemble, from 0.", least=0)] = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Write a model of HelpSteer2's attributes in URM's published layout: its body, tokenizer and head, in safetensors.

    The body must be a Llama whose last token's state is pooled. `RewardModel.from_pretrained` opens the folder, as the
    authors' own code does.
    """
    with reported_errors():
        from rmcore.model.attribute_export import export_urm
        from rmcore.model.reward_model import RewardModel

        check_model_folder(out, overwrite=False, inputs=[model])
        check_device(device)
        loaded = RewardModel.from_pretrained(model, device=device, trust_remote_code=trust_remote_code)
        export_urm(loaded, out, member=member)
        notes.print(f"wrote {out}")
