"""``rmcore plan``: what training a backbone takes, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Literal

import typer

from rmcore.cli.console import reported_errors

__all__ = ["plan"]


def plan(
    backbone: Annotated[str, typer.Option(help="Hugging Face model: hub name or folder; its config.json is read.")],
    mode: Annotated[
        Literal["difference", "concat"], typer.Option(help="Two texts a pair, or both orders of both responses.")
    ] = "difference",
    gpus: Annotated[int, typer.Option(help="How many.")] = 1,
    strategy: Annotated[
        Literal["ddp", "fsdp", "zero3"], typer.Option(help="The model whole on each, or sharded over them.")
    ] = "ddp",
    batch: Annotated[int, typer.Option(help="Pairs of one forward pass on a GPU.")] = 4,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt, about.")] = 256,
    response: Annotated[int, typer.Option(help="Tokens of a response, about.")] = 384,
    pairs: Annotated[int, typer.Option(help="Pairs of an epoch.")] = 80_000,
    epochs: Annotated[float, typer.Option(help="Passes over them.")] = 1.0,
    precision: Annotated[
        Literal["bf16", "fp32"], typer.Option(help="Arithmetic of the forward pass; weights stay in float32.")
    ] = "bf16",
    checkpointing: Annotated[bool, typer.Option(help="Activations are computed again in backward.")] = False,
    lora: Annotated[int | None, typer.Option(help="Rank of adapters on all linear layers.")] = None,
    frozen_bytes: Annotated[float, typer.Option(help="Bytes of a weight under adapters: 2, or 0.55 in 4 bits.")] = 2.0,
    layer_size: Annotated[int, typer.Option(help="Width of the head's spectral-normalised layer; 0 for none.")] = 1024,
    features: Annotated[int, typer.Option(help="Random Fourier features D.")] = 2048,
    tflops: Annotated[float, typer.Option(help="Peak of a GPU in that arithmetic: 989 is an H100's in bf16.")] = 989.0,
    mfu: Annotated[float, typer.Option(help="Share of it that is reached.")] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="Numbers, in bytes.")] = False,
) -> None:
    """Say what training takes: parameters, memory of each GPU, FLOP, and hours at a stated share of the peak.

    Activations are counted on a model without storage, so every architecture is planned as it is; hours are the FLOP
    over --gpus, --tflops and --mfu, and no measurement.

    Example: `rmcore plan --backbone Qwen/Qwen3-0.6B --mode concat --gpus 1 --lora 16 --checkpointing`
    """
    with reported_errors():
        from rmcore.model.plan import PlanConfig, plan_training

        config = PlanConfig(
            mode=mode,
            gpus=gpus,
            strategy=strategy,
            prompt=prompt,
            response=response,
            pairs=pairs,
            epochs=epochs,
            batch=batch,
            bf16=precision == "bf16",
            checkpointing=checkpointing,
            lora=lora,
            frozen_bytes=frozen_bytes,
            layer_size=layer_size or None,
            features=features,
            peak_tflops=tflops,
            mfu=mfu,
        )
        found = plan_training(backbone, config)
        typer.echo(json.dumps({**asdict(found), "memory": found.memory}) if as_json else found.to_markdown())
