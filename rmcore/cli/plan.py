"""``rmcore plan``: what training a backbone takes, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Literal

import typer

from rmcore.cli.console import reported_errors
from rmcore.cli.numbers import number

__all__ = ["plan"]


def plan(
    backbone: Annotated[str, typer.Option(help="Hugging Face model: hub name or folder; its config.json is read.")],
    mode: Annotated[
        Literal["difference", "concat"], typer.Option(help="Two texts a pair, or both orders of both responses.")
    ] = "difference",
    gpus: Annotated[int, number(help="How many.", least=1)] = 1,
    strategy: Annotated[
        Literal["ddp", "fsdp", "zero3"], typer.Option(help="The model whole on each, or sharded over them.")
    ] = "ddp",
    batch: Annotated[int, number(help="Pairs of one forward pass on a GPU.", least=1)] = 4,
    prompt: Annotated[int, number(help="Tokens of a prompt, about.", least=1)] = 256,
    response: Annotated[int, number(help="Tokens of a response, about.", least=1)] = 384,
    pairs: Annotated[int, number(help="Pairs of an epoch.", least=1)] = 80_000,
    epochs: Annotated[float, number(help="Passes over them.", above=0)] = 1.0,
    precision: Annotated[
        Literal["bf16", "fp32"], typer.Option(help="Arithmetic of the forward pass; weights stay in float32.")
    ] = "bf16",
    checkpointing: Annotated[bool, typer.Option(help="Activations are computed again in backward.")] = False,
    lora: Annotated[int | None, number(help="Rank of adapters on all linear layers.", least=1)] = None,
    frozen_bytes: Annotated[
        float, number(help="Bytes of a weight under adapters: 2, or 0.55 in 4 bits.", above=0)
    ] = 2.0,
    layer_size: Annotated[
        int, number(help="Width of the head's spectral-normalised layer; 0 for none.", least=0)
    ] = 1024,
    features: Annotated[int, number(help="Random Fourier features D.", least=1)] = 2048,
    tflops: Annotated[
        float, number(help="Peak of a GPU in that arithmetic: 989 is an H100's in bf16.", above=0)
    ] = 989.0,
    mfu: Annotated[float, number(help="Share of it that is reached.", above=0, most=1)] = 0.4,
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
