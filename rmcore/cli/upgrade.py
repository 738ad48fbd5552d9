"""``rmcore upgrade``: a published reward model gets uncertainties."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from rmcore._base.errors import reject
from rmcore.cli import options
from rmcore.cli.checks import Kept, check_device, check_model_folder, save_or_say
from rmcore.cli.console import encoding_progress, notes, progress_bar, reported_errors
from rmcore.cli.numbers import number
from rmcore.cli.ranks import check_count, part_of, started_ranks, totals
from rmcore.cli.train.options import Chat, Dtype, Overlong, dtype_named

__all__ = ["upgrade"]


def upgrade(
    model: Annotated[str, typer.Argument(help="A published reward model, of any family of `rmcore families`.")],
    pairs: Annotated[
        str, typer.Argument(help="Preferences like those it will score: a file, - or hf://org/name:split.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")],
    family: Annotated[str | None, typer.Option(help="Its family; default: what its files say.")] = None,
    ridge: Annotated[float, number(help="Prior precision of its last layer.", above=0)] = 1.0,
    dtype: Dtype = None,
    max_length: Annotated[
        int | None, number(help="Most tokens a text may have.", least=1, expected="a positive number of tokens")
    ] = None,
    overlong: Overlong = "error",
    chat: Chat = "auto",
    embed_backbone: Annotated[bool, typer.Option(help="Store the model's weights in the folder too.")] = False,
    error_prior: Annotated[
        bool, typer.Option(help="Find out where its scores err on these pairs, for routers that learn: five more fits.")
    ] = True,
    columns: options.Columns = None,
    overwrite: options.Overwrite = False,
    device: options.Device = None,
    attn_implementation: options.AttnImplementation = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    no_cache: options.NoCache = False,
) -> None:
    """Give an existing reward model uncertainties. Its scores do not change; only a posterior is fitted around them.

    Under `torchrun --nproc-per-node 8 -m rmcore.cli upgrade ...` each process reads and encodes its part of the pairs.
    """
    kept = Kept()
    with reported_errors(kept), started_ranks() as ranks:
        from rmcore.head.ranks import working
        from rmcore.model.backbone import Backbone
        from rmcore.model.data import parse_columns, read_preferences
        from rmcore.model.reward_model import RewardModel

        if not (math.isfinite(ridge) and ridge > 0):
            reject("--ridge", ridge, "a positive finite number")
        check_model_folder(out, overwrite=overwrite, inputs=[model, pairs])
        check_device(device)
        with working(ranks, "reading"):
            items = list(read_preferences(pairs, parse_columns(columns or []), part=part_of(ranks)))
        check_count("pairs", len(items), ranks)
        spine = Backbone.from_reward_model(
            model,
            family=family,
            device=device,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            max_length=max_length,
            overlong=overlong,
            chat=chat,
        )
        kept.use(spine, cache=not no_cache)
        with progress_bar() as bar:
            upgraded = RewardModel.upgrade(
                spine,
                items,
                ridge=ridge,
                dtype=dtype_named(dtype),
                error_prior=error_prior,
                progress=encoding_progress(bar),
                ranks=ranks,
            )
        how: Literal["name", "embed"] = "embed" if embed_backbone else "name"
        if ranks is None or ranks.rank == 0:
            with working(ranks, "saving"):
                save_or_say(out, lambda path: upgraded.save_pretrained(path, backbone=how), kept)
        count, tokens = totals(ranks, len(items), spine.stats.tokens)
        notes.print(f"{count} pairs, {tokens} tokens; wrote {out}")
