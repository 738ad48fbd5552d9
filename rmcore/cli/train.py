"""``rmcore train`` and ``rmcore upgrade``: what makes a model with uncertainties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rmcore._base.errors import reject
from rmcore.cli import options
from rmcore.cli.ai_labels import encode_ai, fit_mixture, mix, parse_weight
from rmcore.cli.checks import Kept, check_device, check_model_folder, save_or_say
from rmcore.cli.console import encoding_progress, notes, progress_bar, reported_errors, training_progress
from rmcore.cli.ranks import check_count, part_of, started_ranks
from rmcore.cli.train_attributes import AttributeOptions, AttributePlan, plan_progress, told
from rmcore.cli.train_backbone import (
    main_process,
    many_processes,
    prepared_data,
    save_from_all,
    tell_data,
    train_backbone,
    trainer_process,
    trains_backbone,
)
from rmcore.cli.train_config import read_config, run_settings
from rmcore.cli.train_critiques import check_critiques, train_critiques

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rmcore.head.config import HeadConfig
    from rmcore.head.frozen import FrozenHead
    from rmcore.head.ranks import Ranks
    from rmcore.model.backbone import Backbone, BackboneConfig
    from rmcore.model.tune import Trial

__all__ = ["train", "upgrade"]

Overlong = Annotated[
    Literal["error", "truncate-prompt-left", "truncate-right", "truncate-longest", "no-reward"],
    typer.Option(help="What to do with texts over the limit; no-reward leaves their pairs out."),
]
Chat = Annotated[Literal["auto", "always", "never"], typer.Option(help="Use the tokenizer's chat template.")]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16", "int8"] | None, typer.Option(help="Serving dtype of the head.")
]


@options.with_options
def train(
    *,
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the model to.")],
    backbone: Annotated[str, typer.Option(help="Hugging Face model: hub name or folder.")],
    preferences: Annotated[
        str | None, typer.Argument(help="Preferences (prompt, chosen, rejected): a file, - or hf://org/name:split.")
    ] = None,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            is_eager=True,
            callback=read_config,
            help="YAML, in TRL's style: these options, data sources, and transformers' TrainingArguments.",
        ),
    ] = None,
    settings_given: Annotated[
        list[str] | None, typer.Option("--set", help="A TrainingArguments field, name=value; over --config's.")
    ] = None,
    mode: Annotated[
        Literal["difference", "concat"], typer.Option(help="A row a response, or a row a pair.")
    ] = "difference",
    pooling: Annotated[
        Literal["last", "mean", "first"], typer.Option(help="Which token's state, or their mean.")
    ] = "last",
    layer: Annotated[int | None, typer.Option(help="Pool this layer's output and skip the later ones.")] = None,
    features: Annotated[int, typer.Option(help="Random Fourier features D.")] = 1024,
    layer_size: Annotated[int | None, typer.Option(help="Width of a spectral-normalised layer.")] = None,
    epochs: Annotated[int, typer.Option(help="AdamW epochs over the layer first; needs --layer-size.")] = 0,
    finetune_epochs: Annotated[
        int, typer.Option(help="Epochs over backbone and head first, on transformers' Trainer; stores both.")
    ] = 0,
    lr_backbone: Annotated[float, typer.Option(help="Learning rate of the backbone.")] = 2e-5,
    ridge: Annotated[float, typer.Option(help="Prior precision of β.")] = 1.0,
    kernel_scale: Annotated[float, typer.Option(help="κ; 3 suits difference mode.")] = 3.0,
    length_scale_factor: Annotated[float, typer.Option(help="ℓ as a multiple of the median distance.")] = 2.0,
    length_feature: Annotated[float, typer.Option(help="Weight of a log-length feature, 0 for none.")] = 0.0,
    likelihood: Annotated[
        Literal["logistic", "gaussian"], typer.Option(help="Posterior; gaussian as in the published code.")
    ] = "logistic",
    calibrate: Annotated[
        str | None, typer.Option(help="Held-out preferences: fit the amplitude a of u = √(1 + a v) on them.")
    ] = None,
    critiques: options.Critiques = False,
    ai_labels: Annotated[
        str | None, typer.Option(help="Preferences of a judge (rmcore label), to learn from besides.")
    ] = None,
    ai_weight: Annotated[
        str,
        typer.Option(
            help="What a pair of --ai-labels counts, where one of people's counts 1; auto: the best on people's pairs "
            "left out, and a table says whether the judge's labels help."
        ),
    ] = "auto",
    dtype: Dtype = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens a text may have.")] = None,
    overlong: Overlong = "error",
    chat: Chat = "auto",
    embed_backbone: Annotated[bool, typer.Option(help="Store the backbone's weights in the folder too.")] = False,
    tune: Annotated[
        bool,
        typer.Option(
            help="Choose ridge, length-scale, kernel scale and number of features by log-loss on pairs left out, "
            "three-fold, beginning with those given; prints a table. Not with --epochs or --finetune-epochs."
        ),
    ] = False,
    error_prior: Annotated[
        bool,
        typer.Option(
            help="Find out where the head errs on pairs it was not fitted on, for routers that learn: five more "
            "fits, or after --epochs and --finetune-epochs on the pairs of --calibrate."
        ),
    ] = True,
    uncertainty: Annotated[
        str | None,
        typer.Option(
            help="Fit others beside the head, on the same pairs, and serve the model with the first: laplace, "
            "laplace-kron, laplace-diag, dropout, ensemble, urm, urme, sngp-urm, with commas between them."
        ),
    ] = None,
    by_attributes: AttributeOptions,
    seed: Annotated[int, typer.Option(help="Seed of the features.")] = 0,
    columns: options.Columns = None,
    overwrite: options.Overwrite = False,
    device: options.Device = None,
    attn_implementation: options.AttnImplementation = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    no_cache: options.NoCache = False,
) -> None:
    """Train an uncertainty-aware reward model from preferences.

    The backbone stays as it is unless --finetune-epochs is given, or num_train_epochs or max_steps in --config. Texts
    are encoded once; β is fitted by Newton's method in a few passes, and the posterior that gives uncertainties falls
    out of the last one. Under `accelerate launch -m rmcore train ...` or torchrun all processes train one backbone.

    Under `torchrun --nproc-per-node 8 -m rmcore.cli train ...` each process reads and encodes its part of the data, and
    all fit one head.

    With --attributes it is a model of several attributes (URM, with --members URME): stage 1 learns their means and σ
    from labelled responses, stage 2 the gate from pairs; the head is fitted on the pairs, for routers.

    Example: `rmcore train prefs.jsonl --backbone Qwen/Qwen3-0.6B --pooling mean -o my-rm`
    """
    kept = Kept()
    with reported_errors(kept):
        settings = run_settings(context, settings_given)
        finetunes = trains_backbone(settings, finetune_epochs)
    # A backbone's processes are accelerate's: each reads all of the data.
    with reported_errors(kept), trainer_process() if finetunes else started_ranks() as ranks:
        from rmcore._base.prompt import content_key
        from rmcore.head.config import HeadConfig
        from rmcore.head.fit import fit, fit_amplitude
        from rmcore.head.ranks import working
        from rmcore.head.sngp import SNGPHead
        from rmcore.model.ai_weight import EncodedPairs
        from rmcore.model.backbone import BackboneConfig
        from rmcore.model.data import parse_columns, read_preferences
        from rmcore.model.error_prior_fit import error_prior_of
        from rmcore.model.reward_model import RewardModel
        from rmcore.model.training import train_layer
        from rmcore.model.training_pairs import encode_preferences, informative
        from rmcore.model.tune import tune as choose
        from rmcore.model.uncertainties import fit_estimators

        further = estimator_names(uncertainty, mode)
        if by_attributes.attributes is None and by_attributes != AttributeOptions():
            reject("--pairs, --members and what goes with them", "without --attributes", "together with it")
        if epochs and layer_size is None:
            reject("--epochs", epochs, "0 without --layer-size, since there is no layer to train")
        if settings.arguments and not finetunes:
            reject("--config", f"{sorted(settings.arguments)} without training", "num_train_epochs or max_steps too")
        if further and (ranks is not None or ai_labels is not None):
            reject("--uncertainty", "with --ai-labels or several processes", "one process, and people's labels alone")
        if (settings.datasets is not None or settings.held_out is not None) and ranks is not None:
            reject("datasets, held_out", f"with {ranks.size} processes and no backbone to train", "one process")
        if further and finetunes and many_processes():
            reject("--uncertainty", "with several processes", "one process")
        if ai_labels is not None and ranks is not None:
            reject("--ai-labels", f"with {ranks.size} processes", "one process, or no labels of a judge")
        if tune and (epochs or finetunes):
            reject("--tune", "with --epochs or --finetune-epochs", "it alone: layers are trained for one configuration")
        for option, count in (("--epochs", epochs), ("--finetune-epochs", finetune_epochs)):
            if count < 0:
                reject(option, count, "0 or more")
        if not (math.isfinite(lr_backbone) and lr_backbone > 0):
            reject("--lr-backbone", lr_backbone, "a positive number")
        if ai_labels is not None and (epochs or finetunes):
            reject("--ai-labels", "with --epochs or --finetune-epochs", "it alone: weights are tried on fixed states")
        weight = parse_weight(ai_weight)
        if ai_labels is None and ai_weight != "auto":
            reject("--ai-weight", "without --ai-labels", "together with it")
        config = HeadConfig(
            1,  # the backbone's width, once it is known; all else is checked now
            num_features=features,
            mode=mode,
            layer_size=layer_size,
            ridge=ridge,
            kernel_scale=kernel_scale,
            length_scale_factor=length_scale_factor,
            likelihood=likelihood,
            seed=seed,
        )
        check_model_folder(
            out,
            overwrite=overwrite,
            inputs=[one for one in (backbone, preferences, calibrate, ai_labels, by_attributes.pairs) if one],
        )
        check_device(device)
        names = parse_columns(columns or [])
        plan = None
        if by_attributes.attributes is not None:
            others = (tune, epochs, finetunes, further, calibrate, ai_labels, settings.datasets, settings.held_out)
            if any(other not in (None, 0, False, []) for other in others) or ranks is not None:
                what = (
                    "--tune, --epochs, --finetune-epochs, --calibrate, --uncertainty, --ai-labels, --config's data or "
                    "several processes"
                )
                reject("--attributes", f"with {what}", "alone")
            if preferences is None:
                reject("preferences", "none", "at least one")
            plan = AttributePlan.read(by_attributes, preferences, names, mode)
        named = preferences is not None and plan is None
        with working(ranks, "reading"):
            reading = partial(read_preferences, columns=names, part=part_of(ranks), critiques=critiques)
            items = list(reading(preferences)) if named and preferences else []
            held_out = [] if calibrate is None else list(reading(calibrate))
        if plan is None and (named or settings.datasets is None):
            check_count("preferences", len(items), ranks)
        data_report = None
        held_out_count = 0 if calibrate is None else check_count("--calibrate", len(held_out), ranks)
        if settings.datasets is not None or settings.held_out is not None:
            items, unseen_prompts, data_report = prepared_data(
                settings, items if named else None, seed, critiques=critiques
            )
            held_out = unseen_prompts if calibrate is None else held_out
            held_out_count = len(held_out)
        judged = [] if ai_labels is None else list(read_preferences(ai_labels, names))
        if ai_labels is not None and not judged:
            reject("--ai-labels", "no lines", "at least one")
        if critiques:
            streamed = finetunes and settings.streaming
            excluded = (tune, epochs, further, ai_labels, by_attributes.attributes, ranks)
            check_critiques(items, excluded, streamed=streamed)
            if mode == "concat":
                from rmcore.model.critiqued_data import behind_critiques

                if finetunes:
                    reject("--critiques", "with --mode concat and a backbone to train", "--mode difference")
                items, held_out = behind_critiques(items), behind_critiques(held_out)
        spine = _load_backbone(
            BackboneConfig(
                name=backbone,
                pooling=pooling,
                layer=layer,
                length_feature=length_feature,
                max_length=max_length,
                overlong=overlong,
                chat=chat,
            ),
            device,
            attn_implementation,
            trust_remote_code,
        )
        config = replace(config, hidden_size=spine.hidden_size)
        kept.use(spine, cache=not no_cache)
        if plan is not None:
            line = _train_attributes(plan, spine, config, dtype, out, kept, embed=embed_backbone, seed=seed)
            notes.print(f"{line}; {spine.stats.tokens} tokens; wrote {out}")
            return
        if critiques and not finetunes and mode == "difference":
            with progress_bar() as bar:
                own_data = (items, held_out, config, _dtype(dtype), encoding_progress(bar))
                line = train_critiques(spine, *own_data, out, kept, embed=embed_backbone, error_prior=error_prior)
            notes.print(f"{line}; {spine.stats.tokens} tokens; wrote {out}")
            return
        with progress_bar() as bar:
            head = SNGPHead(config).to(spine.device)
            if finetunes:
                own = {"epochs": finetune_epochs, "lr": lr_backbone, "seed": seed, "dtype": dtype}
                own |= {"critiques": critiques}
                trainer = train_backbone(
                    spine, head, items, held_out, settings, bar, out=out, report=data_report, **own
                )
                if many_processes() or settings.streaming or critiques:
                    told = save_from_all(trainer, held_out, out, settings, data_report)
                    if main_process():
                        notes.print(told)
                    return
            if judged:  # prompts are needed by pair, so those that teach nothing go first
                items = [items[k] for k in informative(spine, items, mode)]
            silent: dict[int, str] = {}
            with working(ranks, "encoding"):
                hidden, labels, pairs = encode_preferences(
                    spine, items, mode, progress=encoding_progress(bar), may_be_empty=ranks is not None, reasons=silent
                )
            if data_report is not None and not finetunes:
                data_report.leave_out(silent)
                tell_data(data_report, settings)
            if tune:
                config, trials = choose(config, hidden, labels, pairs, seed=seed, ranks=ranks)
                head = SNGPHead(config).to(spine.device)
            if epochs:
                watch, _ = training_progress(bar, "training the layer")
                train_layer(head, hidden, labels, pairs=pairs, epochs=epochs, seed=seed, progress=watch, ranks=ranks)
            mixture = None
            if judged:
                people = EncodedPairs(hidden, labels, pairs, [content_key(item.prompt) for item in items])
                mixture = mix(config, people, encode_ai(spine, judged, mode, encoding_progress(bar)), weight, seed)
                frozen, report = fit_mixture(config, mixture, _dtype(dtype))
            else:
                frozen, report = fit(head, hidden, labels, pairs=pairs, dtype=_dtype(dtype), ranks=ranks)
            if held_out_count:
                with working(ranks, "encoding --calibrate"):
                    unseen, outcomes, unseen_pairs = encode_preferences(
                        spine, held_out, mode, progress=encoding_progress(bar), may_be_empty=ranks is not None
                    )
                calibrated = fit_amplitude(frozen, *_scored(frozen, unseen, unseen_pairs), outcomes, ranks=ranks)
                if calibrated.config.resolved_amplitude == 0:
                    notes.print(
                        f"--calibrate: {held_out_count} pairs want amplitude 0, which makes u = 1 everywhere and "
                        f"leaves routers nothing to go by; it stays {frozen.config.resolved_amplitude:.3g}"
                    )
                else:
                    frozen = calibrated
            prior = None
            if error_prior and not epochs and not finetunes:
                with_ai = None if mixture is None else mixture.fitted(config)
                known = (frozen.config, items, hidden, labels, pairs)
                prior = error_prior_of(*known, fitted=with_ai, ranks=ranks)
            elif error_prior and held_out_count:  # trained layers have seen every pair but these
                unknown = (frozen.config, held_out, unseen, outcomes, unseen_pairs)
                prior = error_prior_of(*unknown, held_out_of=(frozen, hidden), ranks=ranks)
        if tune:
            notes.print(_tuned(config, trials), markup=False, highlight=False)
        if mixture is not None and mixture.report is not None:
            notes.print(mixture.report.to_markdown(), markup=False, highlight=False)
        model = RewardModel(spine, frozen, prior)
        model.critiqued = critiques
        if further:
            assert pairs is not None
            model.estimators |= fit_estimators(further, hidden, labels, pairs, config)
            model.uncertainty = further[0]
        how: Literal["name", "embed"] = "embed" if embed_backbone or finetunes else "name"
        if ranks is None or ranks.rank == 0:
            with working(ranks, "saving"):
                save_or_say(out, lambda path: model.save_pretrained(path, backbone=how), kept)
        logit, _ = _scored(frozen, hidden, pairs)
        counts = int(((logit > 0) == (labels > 0.5)).sum()), len(labels), spine.stats.tokens
        right, rows, tokens = _totals(ranks, *counts)
        beside = "" if mixture is None else f" and {len(mixture.ai)} of a judge at weight {mixture.weight:g}"
        amplitude = f"amplitude {frozen.config.resolved_amplitude:.3g}; " if held_out_count else ""
        notes.print(
            f"{rows if mode == 'difference' else rows // 2} pairs{beside}, {tokens} tokens; "
            f"Newton {'converged' if report.converged else 'stopped'} after {report.passes} passes; "
            f"training accuracy {100 * right / rows:.1f}%; {amplitude}wrote {out}"
        )


def estimator_names(names: str | None, mode: str) -> list[str]:
    """The estimators to fit beside the head; raises InputError for words that are none."""
    from rmcore.head.estimators import ESTIMATORS

    words = [] if names is None else [word.strip() for word in names.split(",")]
    for word in words:
        if word not in ESTIMATORS or word == "sngp" or words.count(word) > 1:
            expected = f"each once, of {', '.join(name for name in ESTIMATORS if name != 'sngp')}"
            reject("--uncertainty", repr(names)[:60], expected, "sngp is the head itself")
    if words and mode != "difference":
        reject("--uncertainty", f"given with --mode {mode}", "difference, whose pairs share the responses' rows")
    return words


def _train_attributes(
    plan: AttributePlan,
    spine: Backbone,
    config: HeadConfig,
    dtype: str | None,
    out: Path,
    kept: Kept,
    *,
    embed: bool,
    seed: int,
) -> str:
    """Train by attributes and save; returns a line about it."""
    from rmcore.model.attribute_training import fit_attribute_model

    with progress_bar() as bar:
        model, found = fit_attribute_model(
            spine,
            plan.rows,
            plan.names,
            preferences=plan.preferences,
            prefer=plan.prefer,
            members=plan.members,
            config=config,
            dtype=_dtype(dtype),
            seed=seed,
            progress=plan_progress(bar),
            **plan.training,
        )
    how: Literal["name", "embed"] = "embed" if embed else "name"
    save_or_say(out, lambda path: model.save_pretrained(path, backbone=how), kept)
    return told(found, plan)


def upgrade(
    model: Annotated[str, typer.Argument(help="A published reward model, of any family of `rmcore families`.")],
    pairs: Annotated[
        str, typer.Argument(help="Preferences like those it will score: a file, - or hf://org/name:split.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")],
    family: Annotated[str | None, typer.Option(help="Its family; default: what its files say.")] = None,
    ridge: Annotated[float, typer.Option(help="Prior precision of its last layer.")] = 1.0,
    dtype: Dtype = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens a text may have.")] = None,
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
                dtype=_dtype(dtype),
                error_prior=error_prior,
                progress=encoding_progress(bar),
                ranks=ranks,
            )
        how: Literal["name", "embed"] = "embed" if embed_backbone else "name"
        if ranks is None or ranks.rank == 0:
            with working(ranks, "saving"):
                save_or_say(out, lambda path: upgraded.save_pretrained(path, backbone=how), kept)
        count, tokens = _totals(ranks, len(items), spine.stats.tokens)
        notes.print(f"{count} pairs, {tokens} tokens; wrote {out}")


def _totals(ranks: Ranks | None, *mine: int) -> list[int]:
    """Whole numbers, summed over all ranks."""
    import torch

    return list(mine) if ranks is None else [int(n) for n in ranks.total(torch.tensor(mine, dtype=torch.float64))]


def _tuned(config: HeadConfig, trials: Sequence[Trial]) -> str:
    """What was tried, and what was chosen."""
    lines = ["setting                    value  log-loss  accuracy  (on pairs left out)"]
    for trial in trials:
        value = f"{trial.value:g}" if trial.setting else "–"
        lines.append(f"{trial.setting or 'as given':22s} {value:>9s}  {trial.loss:8.4f}  {100 * trial.accuracy:7.1f}%")
    chosen = ("length_scale_factor", "kernel_scale", "ridge", "num_features")
    return "\n".join([*lines, "chosen: " + ", ".join(f"{name} {getattr(config, name):g}" for name in chosen)])


def _load_backbone(
    config: BackboneConfig, device: str | None, attn_implementation: str, trust_remote_code: bool
) -> Backbone:
    from rmcore.model.backbone import Backbone

    return Backbone.from_pretrained(
        config, device=device, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
    )


def _scored(head: FrozenHead, hidden: Tensor, pairs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logit and variance of every pair, as ``encode_preferences`` gives them."""
    import torch

    if not len(hidden):
        return hidden.new_empty(0), hidden.new_empty(0)
    if pairs is None:
        scores = head.score(hidden)
        return scores.logit, scores.variance
    twos = torch.full((len(pairs),), 2, dtype=torch.int64)
    found = head.score_pairs(hidden[pairs.flatten()], twos)
    return found.logit, found.variance


def _dtype(name: str | None) -> torch.dtype | None:
    """The dtype called ``name``, one of :data:`Dtype`."""
    import torch

    found: torch.dtype | None = None if name is None else getattr(torch, name)
    return found
