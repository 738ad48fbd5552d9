"""``rmcore train``, the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rmcore.cli import options
from rmcore.cli.checks import Kept, check_device, check_model_folder
from rmcore.cli.console import encoding_progress, notes, progress_bar, reported_errors
from rmcore.cli.ranks import many_processes, started_ranks
from rmcore.cli.train.attributes import AttributeOptions, AttributePlan, train_attributes
from rmcore.cli.train.backbone import (
    save_from_all,
    train_backbone,
    trainer_process,
    trains_backbone,
)
from rmcore.cli.train.checks import check_options
from rmcore.cli.train.config import read_config, run_settings
from rmcore.cli.train.critiques import train_critiques
from rmcore.cli.train.data import read_data
from rmcore.cli.train.head import HeadRun
from rmcore.cli.train.options import BackboneOptions, HeadOptions, RecipeOptions

__all__ = ["train"]


@options.with_options
def train(
    *,
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the model to.")],
    source: BackboneOptions,
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
    head: HeadOptions,
    recipe: RecipeOptions,
    by_attributes: AttributeOptions,
    columns: options.Columns = None,
    overwrite: options.Overwrite = False,
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
        finetunes = trains_backbone(settings, recipe.finetune_epochs)
    # A backbone's processes are accelerate's: each reads all of the data.
    with reported_errors(kept), trainer_process() if finetunes else started_ranks() as ranks:
        from rmcore.head.sngp import SNGPHead
        from rmcore.model.data import parse_columns

        check_options(head, recipe, by_attributes, settings, preferences, ranks, finetunes=finetunes)
        read = (source.backbone, preferences, recipe.calibrate, recipe.ai_labels, by_attributes.pairs)
        check_model_folder(out, overwrite=overwrite, inputs=[one for one in read if one])
        check_device(source.device)
        names = parse_columns(columns or [])
        if by_attributes.attributes is not None:
            assert preferences is not None
            plan = AttributePlan.read(by_attributes, preferences, names, head.mode)
            spine = source.load()
            kept.use(spine, cache=not no_cache)
            line = train_attributes(plan, spine, head, out, kept, storing=recipe.storing)
            notes.print(f"{line}; {spine.stats.tokens} tokens; wrote {out}")
            return
        data = read_data(preferences, names, head, recipe, settings, ranks, finetunes=finetunes)
        spine = source.load()
        kept.use(spine, cache=not no_cache)
        with progress_bar() as bar:
            if recipe.critiques and not finetunes and head.mode == "difference":
                line = train_critiques(spine, data, head, recipe, encoding_progress(bar), out, kept)
                line = f"{line}; {spine.stats.tokens} tokens; wrote {out}"
            elif finetunes:
                trained = SNGPHead(head.config(spine.hidden_size)).to(spine.device)
                trainer = train_backbone(spine, trained, data, settings, bar, out=out, options=head, recipe=recipe)
                if many_processes() or settings.streaming or recipe.critiques:
                    line = save_from_all(trainer, data, out, settings)
                else:
                    line = HeadRun(spine, data, head, recipe, settings, ranks, trained).run(bar, out, kept)
            else:
                line = HeadRun(spine, data, head, recipe, settings, ranks).run(bar, out, kept)
        notes.print(line)
