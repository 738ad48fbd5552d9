"""``rmcore check``: does a model score here as its own code does?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rmcore._base.errors import reject
from rmcore._base.files import write_atomic
from rmcore.cli import options
from rmcore.cli.checks import check_device
from rmcore.cli.console import notes, print_markdown, reported_errors
from rmcore.cli.model_checks import check_options
from rmcore.cli.numbers import number

__all__ = ["check"]


def check(
    model: Annotated[str, typer.Argument(help="A reward model: a hub name, a folder, or one that rmcore wrote.")],
    pairs: Annotated[
        str | None,
        typer.Argument(help="Preferences to score: a file, - or hf://org/name:split; default: a few made up."),
    ] = None,
    most: Annotated[int, number(help="Most preferences to take.", least=1)] = 64,
    tolerance: Annotated[
        float | None, number(help="Allowed difference of scores; default: rounding of the model's dtype.", least=0)
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Arithmetic of the model; default: bfloat16 on a GPU, else float32."),
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="URL of a server with the same model, whose states are held against it too.")
    ] = None,
    server_kind: Annotated[Literal["vllm", "sglang", "llamacpp"], typer.Option(help="Which server that is.")] = "vllm",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File for the report, as Markdown.")] = None,
    columns: options.Columns = None,
    device: options.Device = None,
    attn_implementation: options.AttnImplementation = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    deterministic: options.Deterministic = None,
    max_length: options.MaxLength = None,
    overlong: options.Overlong = None,
) -> None:
    """Hold a model's scores against its own forward pass: tokens, padding, batches, shared prefixes. Exit code 1 if not
    the same.
    """
    with reported_errors():
        import torch

        from rmcore.model.check import check_model, served
        from rmcore.model.data import parse_columns, read_preferences
        from rmcore.model.reward_model import RewardModel

        check_device(device)
        check_options(model, max_length=max_length, overlong=overlong)
        if tolerance is not None and not tolerance >= 0:
            reject("--tolerance", tolerance, "a number from 0")
        items = None if pairs is None else list(read_preferences(pairs, parse_columns(columns or [])))
        if items is not None and not items:
            reject("pairs", "no lines", "at least one")
        loaded = RewardModel.from_pretrained(
            model,
            device=device,
            dtype=None if dtype is None else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            deterministic=deterministic,
            max_length=max_length,
            overlong=overlong,
        )
        remote = None if server is None else served(loaded.backbone, server, server_kind)
        if items is not None and len(items) > most:
            notes.print(f"the first {most} of {len(items)} preferences (--most)")
        report = check_model(loaded, items and items[:most], tolerance=tolerance, remote=remote)
        print_markdown(report.to_markdown())
        if out is not None:
            write_atomic(out, report.to_markdown() + "\n")
    if not report.passed:
        raise typer.Exit(1)
