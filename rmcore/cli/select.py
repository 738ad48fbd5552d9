"""``rmcore select``: which pairs are worth a label."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from rmcore._base.errors import reject
from rmcore.cli import options
from rmcore.cli.checks import Kept, check_device
from rmcore.cli.console import encoding_progress, notes, progress_bar, reported_errors
from rmcore.cli.load_model import load_model
from rmcore.cli.model_checks import check_options
from rmcore.cli.numbers import number
from rmcore.cli.output import check_file, opened_output

__all__ = ["select"]


@options.with_options
def select(
    *,
    model: options.Model,
    groups: Annotated[
        str, typer.Argument(help="Prompts with two responses or more: a file, - or hf://org/name:split.")
    ],
    count: Annotated[int, number(help="How many pairs to choose.", least=1)],
    by: Annotated[
        Literal["bald", "d_optimality", "margin", "coreset", "delta_ucb", "thompson", "random"],
        typer.Option(help="What makes a pair worth a label; delta_ucb and thompson choose one a prompt."),
    ] = "bald",
    beta: Annotated[float, number(help="Of delta_ucb: how many standard deviations count.", least=0)] = 1.0,
    seed: Annotated[int, number(help="Of random, thompson, and coreset's first pair.", least=0)] = 0,
    out: Annotated[str, typer.Option("--out", "-o", help="File for the pairs, one JSON line each; - is stdout.")] = "-",
    columns: options.Columns = None,
    overwrite: options.Overwrite = False,
    loading: options.Loading,
    uncertainty: options.Uncertainty = None,
) -> None:
    """Choose the pairs that a label would teach the head most about, best first: for people, or for a judge.

    All pairs of responses of a prompt are candidates. A line holds the prompt, the two responses, where they come from
    (the input's group, i and j), what the pair was worth when it was chosen, and the head's logit.

    Example: `rmcore select my-rm pool.jsonl --by bald --count 500 -o to-label.jsonl`
    """
    kept = Kept()
    with reported_errors(kept):
        from rmcore.engine.acquisition import pair_pool, select_pairs
        from rmcore.model.data import parse_columns, read_groups
        from rmcore.model.signal import PairSignal, fill_unread, pair_signals
        from rmcore.ops.pair_layout import PairLayout

        check_device(loading.device)
        limits: dict[str, Any] = {"max_length": loading.max_length, "overlong": loading.overlong}
        check_options(model, uncertainty=uncertainty, mode="difference", **limits)
        check_file(out, inputs=[groups], overwrite=overwrite)
        items = list(read_groups(groups, parse_columns(columns or [])))
        if not any(len(group.responses) > 1 for group in items):
            reject("groups", f"{len(items)} prompts, none with two responses", "at least one pair")
        loaded = load_model(model, loading, kept)
        if loaded.mode != "difference":
            reject(
                "model", f"a head in {loaded.mode} mode", "one in difference mode, whose posterior is over responses"
            )
        knows = loaded.estimator_named(uncertainty)
        encoded = loaded.encode_groups([g.prompt for g in items], [g.responses for g in items])
        with progress_bar() as bar:
            hidden = fill_unread(loaded.hidden_rows(encoded, progress=encoding_progress(bar)), encoded)
            layout = PairLayout([len(g.responses) for g in items])
            every = pair_pool(loaded.head, hidden, layout.sizes, uncertainty=knows)
            signal = pair_signals([t for g in encoded for t in g], layout.pair_rows("difference"), "difference")
            pool = every[signal == PairSignal.PRESENT]
            if not len(pool):
                reject(
                    "groups",
                    f"{len(every)} pairs, all with equal or unread inputs",
                    "one that the model can tell apart",
                )
            task = bar.add_task("choosing", total=min(count, len(pool)))
            rows, worth = select_pairs(
                pool, count, by, beta=beta, seed=seed, progress=lambda done, _of: bar.update(task, completed=done)
            )
            bar.update(task, completed=len(rows))
        with opened_output(out) as output:
            for row, value in zip(rows.tolist(), worth.tolist(), strict=True):
                group, i, j = items[int(pool.group[row])], int(pool.i[row]), int(pool.j[row])
                output.write(
                    {
                        "prompt": group.prompt,
                        "responses": [group.responses[i], group.responses[j]],
                        "group": int(pool.group[row]),
                        "i": i,
                        "j": j,
                        "worth": value if value != float("inf") else None,
                        "logit": float(pool.logit[row]),
                    }
                )
        notes.print(f"chose {len(rows)} of {len(every)} pairs of {len(items)} prompts by {by}")
        if len(pool) < len(every):
            notes.print(
                f"{len(every) - len(pool)} pairs were no candidates: "
                "their inputs are equal, or one is too long and unread"
            )
