"""The command line: ``rmcore train | upgrade | score | evaluate | demo``. JSON Lines in, JSON Lines out.

Exit codes: 0 done; 1 something failed (a model that cannot be loaded, say); 2 bad input or usage. A bad line names its
number and what is wrong, and everything before it is scored and written first.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rmcore import cli_options as options
from rmcore.errors import DataError, InputError, RmcoreError, reject
from rmcore.selection_cli import best_of_command as _best_of
from rmcore.selection_cli import filter_command as _filter
from rmcore.serve.cli import serve as _serve
from rmcore.verdicts_cli import app as _verdicts

if TYPE_CHECKING:
    from rmcore.accounts import Accounts
    from rmcore.backbone import Backbone
    from rmcore.data import Group
    from rmcore.engine import RewardEngine
    from rmcore.groups import GroupScore

    Line = Callable[[Group, GroupScore], dict[str, Any] | None]

app = typer.Typer(
    name="rmcore",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Uncertainty-aware pairwise reward models: train one, score groups of responses with it, send only the "
    "uncertain pairs to an LLM judge, get RLOO advantages back.\n\nTry `rmcore demo` first.",
)

app.add_typer(_verdicts, name="verdicts")
app.command("serve")(_serve)
app.command("best-of")(_best_of)
app.command("filter")(_filter)

# Everything but results goes to stderr, so that stdout can be a pipe.
_notes = Console(stderr=True)

Device = Annotated[str | None, typer.Option(help="torch device; default: cuda if there is one.")]
Overlong = Annotated[
    str,
    typer.Option(help="What to do with texts over the limit: error, truncate-prompt-left, truncate-right, -longest."),
]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, to stderr.")] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    for noisy in ("httpx", "httpcore", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not verbose:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if version:
        import rmcore

        typer.echo(rmcore.__version__)
        raise typer.Exit


@app.command()
def train(
    preferences: Annotated[str, typer.Argument(help="JSONL of preferences (prompt, chosen, rejected); - for stdin.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the model to.")],
    backbone: Annotated[str, typer.Option(help="Hugging Face model: hub name or folder.")],
    mode: Annotated[str, typer.Option(help="difference (a row a response) or concat (a row a pair).")] = "difference",
    pooling: Annotated[str, typer.Option(help="last, mean or first token.")] = "last",
    layer: Annotated[int | None, typer.Option(help="Pool this layer's output and skip the later ones.")] = None,
    features: Annotated[int, typer.Option(help="Random Fourier features D.")] = 1024,
    layer_size: Annotated[int | None, typer.Option(help="Width of a spectral-normalised layer.")] = None,
    epochs: Annotated[int, typer.Option(help="AdamW epochs over the layer first; needs --layer-size.")] = 0,
    finetune_epochs: Annotated[int, typer.Option(help="AdamW epochs over backbone and head first; stores both.")] = 0,
    lr_backbone: Annotated[float, typer.Option(help="Learning rate of the backbone.")] = 2e-5,
    ridge: Annotated[float, typer.Option(help="Prior precision of β.")] = 1.0,
    kernel_scale: Annotated[float, typer.Option(help="κ; 3 suits difference mode.")] = 3.0,
    length_scale_factor: Annotated[float, typer.Option(help="ℓ as a multiple of the median distance.")] = 2.0,
    length_feature: Annotated[float, typer.Option(help="Weight of a log-length feature, 0 for none.")] = 0.0,
    likelihood: Annotated[
        str, typer.Option(help="Posterior: logistic, or gaussian as in the published code.")
    ] = "logistic",
    dtype: Annotated[str | None, typer.Option(help="Serving dtype: float32, float16, bfloat16.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens a text may have.")] = None,
    overlong: Overlong = "error",
    chat: Annotated[str, typer.Option(help="auto, always or never use the tokenizer's chat template.")] = "auto",
    embed_backbone: Annotated[bool, typer.Option(help="Store the backbone's weights in the folder too.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the features.")] = 0,
    device: Device = None,
) -> None:
    """Train an uncertainty-aware reward model from preferences.

    The backbone stays as it is unless --finetune-epochs is given. Texts are encoded once; β is fitted by Newton's
    method in a few passes, and the posterior that gives uncertainties falls out of the last one.

    Example: `rmcore train prefs.jsonl --backbone Qwen/Qwen3-0.6B --pooling mean -o my-rm`
    """
    with _errors():
        from rmcore.backbone import BackboneConfig
        from rmcore.data import read_preferences
        from rmcore.fit import fit
        from rmcore.head import HeadConfig, SNGPHead
        from rmcore.model import RewardModel, encode_preferences
        from rmcore.training import finetune, train_layer

        if epochs and layer_size is None:
            reject("--epochs", epochs, "0 without --layer-size, since there is no layer to train")
        items = list(read_preferences(preferences))
        if not items:
            reject("preferences", "no lines", "at least one")
        spine = _load_backbone(
            BackboneConfig(
                name=backbone,
                pooling=pooling,  # type: ignore[arg-type]
                layer=layer,
                length_feature=length_feature,
                max_length=max_length,
                overlong=overlong,  # type: ignore[arg-type]
                chat=chat,  # type: ignore[arg-type]
            ),
            device,
        )
        config = HeadConfig(
            spine.hidden_size,
            num_features=features,
            mode=mode,  # type: ignore[arg-type]
            layer_size=layer_size,
            ridge=ridge,
            kernel_scale=kernel_scale,
            length_scale_factor=length_scale_factor,
            likelihood=likelihood,  # type: ignore[arg-type]
            seed=seed,
        )
        with _bar() as bar:
            head = SNGPHead(config).to(spine.device)
            if finetune_epochs:
                finetune(spine, head, items, epochs=finetune_epochs, lr_backbone=lr_backbone, seed=seed)
            hidden, labels, pairs = encode_preferences(spine, items, mode, progress=_track(bar))
            if epochs:
                train_layer(head, hidden, labels, pairs=pairs, epochs=epochs, seed=seed)
            frozen, report = fit(head, hidden, labels, pairs=pairs, dtype=_dtype(dtype))
        model = RewardModel(spine, frozen)
        model.save_pretrained(out, backbone="embed" if embed_backbone or finetune_epochs else "name")
        right = _training_accuracy(model, hidden, labels, pairs)
        _notes.print(
            f"{len(items)} pairs, {spine.stats.tokens} tokens; Newton {'converged' if report.converged else 'stopped'} "
            f"after {report.passes} passes; training accuracy {100 * right:.1f}%; wrote {out}"
        )


@app.command()
def upgrade(
    model: Annotated[str, typer.Argument(help="A reward model: AutoModelForSequenceClassification with one label.")],
    pairs: Annotated[str, typer.Argument(help="JSONL of preferences like those it will score; - for stdin.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")],
    ridge: Annotated[float, typer.Option(help="Prior precision of its last layer.")] = 1.0,
    dtype: Annotated[str | None, typer.Option(help="Serving dtype of the head.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens a text may have.")] = None,
    overlong: Overlong = "error",
    chat: Annotated[str, typer.Option(help="auto, always or never use the tokenizer's chat template.")] = "auto",
    embed_backbone: Annotated[bool, typer.Option(help="Store the model's weights in the folder too.")] = False,
    device: Device = None,
) -> None:
    """Give an existing reward model uncertainties. Its scores do not change; only a posterior is fitted around them."""
    with _errors():
        from rmcore.backbone import BackboneConfig
        from rmcore.data import read_preferences
        from rmcore.model import RewardModel

        items = list(read_preferences(pairs))
        config = BackboneConfig(
            name=model,
            kind="classifier",
            pooling="classifier",
            max_length=max_length,
            overlong=overlong,  # type: ignore[arg-type]
            chat=chat,  # type: ignore[arg-type]
            append_eos=False,
        )
        spine = _load_backbone(config, device)
        with _bar() as bar:
            upgraded = RewardModel.upgrade(spine, items, ridge=ridge, dtype=_dtype(dtype), progress=_track(bar))
        upgraded.save_pretrained(out, backbone="embed" if embed_backbone else "name")
        _notes.print(f"{len(items)} pairs, {spine.stats.tokens} tokens; wrote {out}")


@app.command()
def score(
    model: Annotated[Path, typer.Argument(help="A folder written by rmcore train or upgrade.")],
    groups: Annotated[str, typer.Argument(help='JSONL of groups: {"prompt": ..., "responses": [...]}; - for stdin.')],
    out: Annotated[str, typer.Option("--out", "-o", help="Where results go; - for stdout.")] = "-",
    threshold: options.Threshold = None,
    budget: options.BudgetFraction = None,
    judge_fraction: options.JudgeFraction = None,
    max_calls: options.MaxCalls = None,
    max_tokens: options.MaxTokens = None,
    max_cost: options.MaxCost = None,
    router_state: options.RouterState = None,
    rank_by: options.RankByOption = "u",
    judge_url: options.JudgeUrl = None,
    judge_model: options.JudgeModel = "",
    judge_key_env: options.JudgeKeyEnv = "OPENAI_API_KEY",
    judge_orders: options.JudgeOrders = "both",
    judge_soft: options.JudgeSoft = False,
    judge_template: options.JudgeTemplate = None,
    judge_deadline: options.JudgeDeadline = None,
    store: options.Store = None,
    prices: options.Prices = None,
    verdicts: options.Verdicts = None,
    batch: Annotated[int, typer.Option(help="Groups scored, routed and written together.")] = 64,
    accounts: Annotated[
        Path | None, typer.Option(help="Append a summary of each batch to this file (rmcore accounts shows it).")
    ] = None,
    backend: Annotated[str, typer.Option(help="Kernels: auto, torch, cpu, triton, cuda.")] = "auto",
    device: Device = None,
) -> None:
    """Score groups of responses: preferences, uncertainties, rewards and RLOO advantages, one JSON line a group.

    Without --threshold, --budget or --judge-fraction no pair goes to a judge.

    Example: `rmcore score my-rm groups.jsonl --budget 0.1 --judge-url http://localhost:8000/v1 --judge-model judge`
    """
    with _errors():
        from rmcore.accounts import Accounts
        from rmcore.engine import RewardEngine
        from rmcore.model import RewardModel

        if batch < 1:
            reject("--batch", batch, "at least 1")
        adaptive = options.make_adaptive_router(
            judge_fraction,
            calls=max_calls,
            tokens=max_tokens,
            cost=max_cost,
            prices=prices,
            model=judge_model,
            rank_by=rank_by,
            orders=judge_orders,
            state=router_state,
        )
        router = options.make_router(threshold, budget, rank_by, adaptive)
        judge = options.make_judge(
            judge_url,
            judge_model,
            judge_key_env,
            orders=judge_orders,
            verdicts=verdicts,
            store=store,
            prices=prices,
            soft=judge_soft,
            template=judge_template,
        )
        loaded = RewardModel.from_pretrained(model, device=device)
        engine = RewardEngine(loaded, judge, router, backend=backend, judge_deadline_s=judge_deadline)  # type: ignore[arg-type]
        booked = Accounts(accounts)

        def save() -> None:
            if adaptive is not None and router_state is not None:
                adaptive.save(router_state)

        _score_stream(engine, groups, out, batch, booked, lambda group, score: score.to_record(), save)
        _print_accounts(booked.totals(), _notes)


@app.command("accounts")
def show_accounts(
    log: Annotated[Path, typer.Argument(help="A file written by rmcore score --accounts, or by Accounts(log).")],
    plot: Annotated[Path | None, typer.Option(help="Also draw the steps to this .png.")] = None,
) -> None:
    """Show what judging came to in a run, or so far in one that goes on: verdicts, cost, latency, hidden time."""
    with _errors():
        from rmcore.accounts import Accounts

        booked = Accounts.read(log)
        _print_accounts(booked.totals(), Console(width=None if sys.stdout.isatty() else 120))
        if plot is not None:
            from rmcore.plots import plot_accounts

            plot_accounts(booked, plot)
            _notes.print(f"wrote {plot}")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A folder written by rmcore train or upgrade.")],
    preferences: Annotated[str, typer.Argument(help="JSONL of held-out preferences; - for stdin.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for report.json and a plot.")] = None,
    train_data: Annotated[Path | None, typer.Option("--train", help="Training preferences, for one control.")] = None,
    replicates: Annotated[int, typer.Option(help="Bootstrap replicates, clustered by prompt.")] = 1000,
    device: Device = None,
) -> None:
    """Evaluate on held-out preferences: accuracy, calibration, and what routing by u is worth beside its controls."""
    with _errors():
        from rmcore.data import read_preferences
        from rmcore.model import RewardModel, encode_preferences
        from rmcore.quality import encode_pairs, evaluate_head
        from rmcore.streams import LabelledPair

        items = list(read_preferences(preferences))
        if not items:
            reject("preferences", "no lines", "at least one")
        loaded = RewardModel.from_pretrained(model, device=device)
        pairs = [LabelledPair(p.prompt, p.chosen, p.rejected, p.label, "") for p in items]
        with _bar() as bar:
            states = encode_pairs(loaded.backbone, pairs, loaded.mode, progress=_track(bar))
            known = None
            if train_data is not None:
                known, _, _ = encode_preferences(
                    loaded.backbone, list(read_preferences(train_data)), loaded.mode, progress=_track(bar)
                )
        report = evaluate_head(loaded.head, states, pairs, train=known, replicates=replicates)
        typer.echo(report.to_markdown())
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / "report.json").write_text(json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n")
            from rmcore.plots import plot_report

            plot_report(report, out / "report.png")
            _notes.print(f"wrote {out / 'report.json'} and {out / 'report.png'}")


@app.command()
def demo(
    data: Annotated[
        Path | None, typer.Option(help="Folder of preference data; default: RMCORE_DATA, else examples.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report and plots.")] = Path("rmcore-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the features and the mixed streams.")] = 0,
) -> None:
    """Train, evaluate, route to a judge over loopback HTTP and print advantages, on real text, in minutes on a CPU."""
    with _errors():
        from rmcore.demo import run_demo

        run_demo(data, out, Console(width=None if sys.stdout.isatty() else 120), seed=seed)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Microbenchmarks against peers and against this machine's limit (`rmcore bench --help` lists the options)."""
    from rmcore.bench.__main__ import main as run_bench

    raise typer.Exit(run_bench(context.args))


# -- helpers ---------------------------------------------------------------------------------------------------------


def _print_accounts(totals: dict[str, Any], console: Console) -> None:
    from rmcore.accounts import account_lines

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in account_lines(totals):
        table.add_row(name, value)
    console.print(table)


def _score_stream(
    engine: RewardEngine, source: str, out: str, batch: int, accounts: Accounts, line: Line, after: Callable[[], None]
) -> None:
    """Score the groups of ``source`` batch by batch, then close the judge.

    ``line`` makes what is written of each group, ``after`` ends a batch.
    """
    from rmcore.data import read_groups

    done = 0
    try:
        with _output(out) as stream, _bar() as bar:
            task = bar.add_task("groups", total=None)
            for chunk, error in _chunks(read_groups(source), batch):
                if chunk:
                    _score_chunk(engine, chunk, stream, accounts, line)
                    done += len(chunk)
                    bar.update(task, completed=done)
                    after()
                if error is not None:
                    raise error
    finally:
        if engine.judge is not None:
            from rmcore.judge.contain import close_judge
            from rmcore.judge.sync import run_sync

            run_sync(close_judge(engine.judge))


def _score_chunk(engine: RewardEngine, chunk: list[Group], stream: Any, accounts: Accounts, line: Line) -> None:
    try:
        scores = engine.score([group.prompt for group in chunk], [group.responses for group in chunk])
    except InputError:
        if len(chunk) == 1:
            group = chunk[0]
            try:
                engine.score([group.prompt], [group.responses])
            except InputError as error:
                raise DataError(str(error), source="groups", line=group.line) from error
        # One bad group must not take the good ones before it along: score them one at a time, up to the bad one.
        for group in chunk:
            _score_chunk(engine, [group], stream, accounts, line)
        return
    accounts.add(scores.summary())
    try:
        for group, score in zip(chunk, scores, strict=True):
            try:
                record = line(group, score)
            except InputError as error:
                raise DataError(str(error), source="groups", line=group.line) from error
            if record is not None:
                named = {} if group.id is None else {"id": group.id}
                stream.write(json.dumps({**named, **record}, allow_nan=False, ensure_ascii=False) + "\n")
    finally:
        stream.flush()


def _chunks(groups: Iterator[Group], size: int) -> Iterator[tuple[list[Group], DataError | None]]:
    chunk: list[Group] = []
    while True:
        try:
            group = next(groups, None)
        except DataError as error:
            yield chunk, error
            return
        if group is None:
            yield chunk, None
            return
        chunk.append(group)
        if len(chunk) == size:
            yield chunk, None
            chunk = []


def _load_backbone(config: Any, device: str | None) -> Backbone:
    from rmcore.backbone import Backbone

    return Backbone.from_pretrained(config, device=device)


def _training_accuracy(model: Any, hidden: Any, labels: Any, pairs: Any) -> float:
    import torch

    if pairs is None:
        wrong = (model.head.score(hidden).logit > 0) != (labels > 0.5)
    else:
        g = model.head.score_pairs(hidden[pairs.flatten()], torch.full((len(pairs),), 2, dtype=torch.int64)).logit
        wrong = (g > 0) != (labels > 0.5)
    return 1 - float(wrong.float().mean())


def _dtype(name: str | None) -> Any:
    if name is None:
        return None
    import torch

    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in kinds:
        reject("--dtype", repr(name), f"one of {', '.join(kinds)}")
    return kinds[name]


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=_notes, transient=True, disable=not _notes.is_terminal)


def _track(bar: Progress) -> Any:
    task = bar.add_task("encoding", total=None)

    def update(stage: str, done: int, total: int) -> None:
        if total:
            bar.update(task, description=f"{stage} (tokens)", completed=done, total=total)

    return update


@contextmanager
def _output(path: str) -> Iterator[Any]:
    if path == "-":
        yield sys.stdout
        return
    with open(path, "w", encoding="utf-8") as stream:
        yield stream


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (InputError, OSError) as error:
        _fail(error, 2)
    except RmcoreError as error:
        _fail(error, 1)


def _fail(error: Exception, code: int) -> NoReturn:
    if isinstance(error, BrokenPipeError):  # the reader of our output went away: not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0)
    typer.echo(f"rmcore: {error}", err=True)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the ``rmcore`` command."""
    app()


if __name__ == "__main__":
    main()
