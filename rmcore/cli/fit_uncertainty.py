"""``rmcore fit-uncertainty``: further uncertainties for a model that is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rmcore._base.errors import reject
from rmcore.cli import options
from rmcore.cli.checks import Kept, check_device, check_model_folder, save_or_say
from rmcore.cli.console import encoding_progress, notes, progress_bar, reported_errors
from rmcore.cli.load_model import load_model
from rmcore.cli.model_checks import check_options
from rmcore.cli.train.options import estimator_names

__all__ = ["fit_uncertainty"]


def fit_uncertainty(
    model: options.Model,
    pairs: Annotated[
        str, typer.Argument(help="Preferences, those the model was trained on say: a file, - or hf://org/name:split.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to; the model's own stays as it is.")],
    uncertainty: Annotated[
        str,
        typer.Option(
            help="Which: laplace, laplace-kron, laplace-diag, dropout, ensemble, urm, urme, sngp-urm, with commas "
            "between them; one that the model has is fitted anew."
        ),
    ],
    serve: Annotated[
        str | None,
        typer.Option(help="What the model is served with where nobody says: one it has then, or head. Default: as is."),
    ] = None,
    columns: options.Columns = None,
    overwrite: options.Overwrite = False,
    device: options.Device = None,
    attn_implementation: options.AttnImplementation = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    no_cache: options.NoCache = False,
) -> None:
    """Fit uncertainties beside the head of an existing model, and save it with them. Its head does not change.

    The pairs are encoded once for all of them. urm, urme and sngp-urm learn from the pairs alone here; with labelled
    attributes it is `rmcore train --attributes`.

    Example: `rmcore fit-uncertainty my-rm prefs.jsonl --uncertainty laplace,ensemble --serve laplace -o my-rm-2`
    """
    kept = Kept()
    with reported_errors(kept):
        from rmcore.head.checkpoint import CONFIG_FILE
        from rmcore.model.data import parse_columns, read_preferences
        from rmcore.model.training_pairs import encode_preferences
        from rmcore.model.uncertainties import HEAD, check_uncertainty, fit_estimators

        names = estimator_names(uncertainty, "difference")
        if serve is not None:
            check_uncertainty(serve, "--serve")
        check_model_folder(out, overwrite=overwrite, inputs=[model, pairs])
        check_device(device)
        check_options(model, mode="difference")
        items = list(read_preferences(pairs, parse_columns(columns or [])))
        if not items:
            reject("pairs", "no lines", "at least one")
        loading = options.Loading(device, attn_implementation, trust_remote_code, no_cache)
        loaded = load_model(model, loading, kept)
        if loaded.mode != "difference":
            reject("model", "one in concat mode", "one in difference mode, whose pairs share the responses' rows")
        if serve is not None:
            has = [HEAD, *dict.fromkeys((*loaded.estimators, *names))]
            if serve not in has:
                reject("--serve", repr(serve), f"one that the model has then: {', '.join(has)}")
            loaded.uncertainty = None if serve == HEAD else serve
        loaded.notice_critiques(False)
        with progress_bar() as bar:
            hidden, labels, index = encode_preferences(
                loaded.backbone, items, "difference", progress=encoding_progress(bar)
            )
        assert index is not None
        loaded.estimators |= fit_estimators(names, hidden, labels, index, loaded.head.config)
        body = Path(loaded.backbone.config.name)
        # A body that the folder brings along is in the new one too.
        own = body.name == "backbone" and (body.parent / CONFIG_FILE).is_file()
        how: Literal["name", "embed"] = "embed" if own else "name"
        save_or_say(out, lambda path: loaded.save_pretrained(path, backbone=how), kept)
        served = loaded.uncertainty or HEAD
        notes.print(
            f"{len(index)} pairs, {loaded.backbone.stats.tokens} tokens; fitted {', '.join(names)}; "
            f"served with {served}; wrote {out}"
        )
