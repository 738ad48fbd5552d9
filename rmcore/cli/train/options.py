"""What ``rmcore train`` can be told, in groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rmcore._base.errors import reject
from rmcore.cli import options
from rmcore.cli.files import file_read
from rmcore.cli.numbers import number

if TYPE_CHECKING:
    import torch

    from rmcore.head.config import HeadConfig
    from rmcore.model.backbone import Backbone

__all__ = [
    "BackboneOptions",
    "Chat",
    "Dtype",
    "HeadOptions",
    "Overlong",
    "RecipeOptions",
    "dtype_named",
    "estimator_names",
]

Overlong = Annotated[
    Literal["error", "truncate-prompt-left", "truncate-right", "truncate-longest", "no-reward"],
    typer.Option(help="What to do with texts over the limit; no-reward leaves their pairs out."),
]
Chat = Annotated[Literal["auto", "always", "never"], typer.Option(help="Use the tokenizer's chat template.")]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16", "int8"] | None, typer.Option(help="Serving dtype of the head.")
]


def dtype_named(name: str | None) -> torch.dtype | None:
    """The dtype called ``name``, one of :data:`Dtype`."""
    import torch

    return None if name is None else getattr(torch, name)


@dataclass(frozen=True)
class BackboneOptions:
    """Which backbone, and how it reads a text."""

    backbone: Annotated[str, typer.Option(help="Hugging Face model: hub name or folder.")]
    pooling: Annotated[Literal["last", "mean", "first"], typer.Option(help="Which token's state, or their mean.")] = (
        "last"
    )
    layer: Annotated[int | None, number(help="Pool this layer's output and skip the later ones.", least=1)] = None
    length_feature: Annotated[float, number(help="Weight of a log-length feature, 0 for none.")] = 0.0
    max_length: Annotated[
        int | None, number(help="Most tokens a text may have.", least=1, expected="a positive number of tokens")
    ] = None
    overlong: Overlong = "error"
    chat: Chat = "auto"
    device: options.Device = None
    attn_implementation: options.AttnImplementation = "auto"
    trust_remote_code: options.TrustRemoteCode = False

    def load(self) -> Backbone:
        """The backbone; raises as :meth:`Backbone.from_pretrained`."""
        from rmcore.model.backbone import Backbone
        from rmcore.model.backbone_config import BackboneConfig

        config = BackboneConfig(
            name=self.backbone,
            pooling=self.pooling,
            layer=self.layer,
            length_feature=self.length_feature,
            max_length=self.max_length,
            overlong=self.overlong,
            chat=self.chat,
        )
        return Backbone.from_pretrained(
            config,
            device=self.device,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True)
class HeadOptions:
    """The head that is fitted."""

    mode: Annotated[Literal["difference", "concat"], typer.Option(help="A row a response, or a row a pair.")] = (
        "difference"
    )
    features: Annotated[int, number(help="Random Fourier features D.", least=1)] = 1024
    layer_size: Annotated[int | None, number(help="Width of a spectral-normalised layer.", least=1)] = None
    ridge: Annotated[float, number(help="Prior precision of β.", above=0)] = 1.0
    kernel_scale: Annotated[float, number(help="κ; 3 suits difference mode.", above=0)] = 3.0
    length_scale_factor: Annotated[float, number(help="ℓ as a multiple of the median distance.", above=0)] = 2.0
    likelihood: Annotated[
        Literal["logistic", "gaussian"], typer.Option(help="Posterior; gaussian as in the published code.")
    ] = "logistic"
    dtype: Dtype = None
    seed: Annotated[int, number(help="Seed of the features.", least=0)] = 0

    def config(self, hidden_size: int = 1) -> HeadConfig:
        """The head's configuration; of width 1 it is enough to check all else. Raises InputError."""
        from rmcore.head.config import HeadConfig

        return HeadConfig(
            hidden_size,
            num_features=self.features,
            mode=self.mode,
            layer_size=self.layer_size,
            ridge=self.ridge,
            kernel_scale=self.kernel_scale,
            length_scale_factor=self.length_scale_factor,
            likelihood=self.likelihood,
            seed=self.seed,
        )

    @property
    def serving_dtype(self) -> torch.dtype | None:
        """``dtype`` as torch calls it."""
        return dtype_named(self.dtype)


@dataclass(frozen=True)
class RecipeOptions:
    """What is done besides a fit of the head, and with which further data."""

    epochs: Annotated[int, number(help="AdamW epochs over the layer first; needs --layer-size.", least=0)] = 0
    finetune_epochs: Annotated[
        int, number(help="Epochs over backbone and head first, on transformers' Trainer; stores both.", least=0)
    ] = 0
    lr_backbone: Annotated[float, number(help="Learning rate of the backbone.", above=0)] = 2e-5
    calibrate: Annotated[
        str | None, file_read(help="Held-out preferences: fit the amplitude a of u = √(1 + a v) on them.", rows=True)
    ] = None
    critiques: options.Critiques = False
    ai_labels: Annotated[
        str | None, file_read(help="Preferences of a judge (rmcore label), to learn from besides.", rows=True)
    ] = None
    ai_weight: Annotated[
        str,
        typer.Option(
            help="What a pair of --ai-labels counts, where one of people's counts 1; auto: the best on people's pairs "
            "left out, and a table says whether the judge's labels help."
        ),
    ] = "auto"
    tune: Annotated[
        bool,
        typer.Option(
            help="Choose ridge, length-scale, kernel scale and number of features by log-loss on pairs left out, "
            "three-fold, beginning with those given; prints a table. Not with --epochs or --finetune-epochs."
        ),
    ] = False
    error_prior: Annotated[
        bool,
        typer.Option(
            help="Find out where the head errs on pairs it was not fitted on, for routers that learn: five more "
            "fits, or after --epochs and --finetune-epochs on the pairs of --calibrate."
        ),
    ] = True
    uncertainty: Annotated[
        str | None,
        typer.Option(
            help="Fit others beside the head, on the same pairs, and serve the model with the first: laplace, "
            "laplace-kron, laplace-diag, dropout, ensemble, urm, urme, sngp-urm, with commas between them."
        ),
    ] = None
    embed_backbone: Annotated[bool, typer.Option(help="Store the backbone's weights in the folder too.")] = False

    def estimators(self, mode: str) -> list[str]:
        """The estimators to fit beside the head; raises InputError for words that are none."""
        return estimator_names(self.uncertainty, mode)

    @property
    def storing(self) -> Literal["name", "embed"]:
        """How the backbone is stored where it was not trained."""
        return "embed" if self.embed_backbone else "name"


def estimator_names(names: str | None, mode: str) -> list[str]:
    """``--uncertainty`` as the estimators to fit beside a head; raises InputError for words that are none."""
    from rmcore.head.estimators import ESTIMATORS

    words = [] if names is None else [word.strip() for word in names.split(",")]
    for word in words:
        if word not in ESTIMATORS or word == "sngp" or words.count(word) > 1:
            expected = f"each once, of {', '.join(name for name in ESTIMATORS if name != 'sngp')}"
            reject("--uncertainty", repr(names)[:60], expected, "sngp is the head itself")
    if words and mode != "difference":
        reject("--uncertainty", f"given with --mode {mode}", "difference, whose pairs share the responses' rows")
    return words
