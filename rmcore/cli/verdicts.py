"""``rmcore verdicts show | export | stats STORE``: what judges were asked, what they said, what it cost.

The store is opened read-only, so this works while a run is writing to it. What it holds was written by judges and by
models in training: on the way to a terminal every character that is not printable is shown as its escape.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from rmcore._base.errors import InputError
from rmcore._base.prompt import message_text, response_text
from rmcore.cli import options
from rmcore.cli.console import print_error, progress_bar, reported_errors, results_console
from rmcore.cli.files import file_read, reading
from rmcore.cli.numbers import number
from rmcore.cli.output import check_file, opened_output

if TYPE_CHECKING:
    from rmcore.judge.store.database import StoreError
    from rmcore.judge.store.ledger import VerdictLedger
    from rmcore.judge.store.logged import JudgedPair, LoggedCall

_UNCUT = 1 << 30
"""Columns of a table that goes into a pipe."""

app = typer.Typer(no_args_is_help=True, help="Read a verdict store: show calls, export preferences, count.")

Store = Annotated[str, typer.Argument(help="A verdict store, as given to a judge: a file, or postgresql://…")]
Prices = Annotated[
    Path | None, file_read(help="JSON price table: tokens are priced by it, not by what was known at the time.")
]
Model = Annotated[str | None, typer.Option(help="Only this model.")]


@app.command()
def show(
    store: Store,
    key: Annotated[
        str | None, typer.Argument(help="Key of a call or a pair, or its beginning: shows everything said in it.")
    ] = None,
    model: Model = None,
    reason: Annotated[str | None, typer.Option(help="Only calls with this reason, such as refusal.")] = None,
    limit: Annotated[int, number(help="The latest so many.", least=1)] = 20,
) -> None:
    """Show the latest calls as a table, or everything about one call or pair.

    A call that cannot be read is named and left out; the exit code is 2 then.

    Example: `rmcore verdicts show verdicts.db --reason refusal`, then `rmcore verdicts show verdicts.db 3f9c2a`
    """
    damage = _Damage()
    with _opened(store) as ledger:
        calls = ledger.calls(key=key, model=model, reason=reason, limit=limit, unreadable=damage)
        if key is None:
            _print_table(ledger, calls, damage)
            damage.report()
            return
        if not calls:
            damage.report()
            raise InputError(f"key: got {key!r:.80}, expected the beginning of a key in {store}")
        many = {call.pair for call in calls}
        if len(many) > 1:
            raise InputError(f"key: got {key!r:.80}, which begins keys of {len(many)} pairs, expected more digits")
        for call in reversed(calls):
            with damage.noted():
                _print_call(ledger, call)
    damage.report()


@app.command()
def export(
    store: Store,
    out: Annotated[str, typer.Option("--out", "-o", help="Where rows go; - for stdout.")] = "-",
    model: Model = None,
    flips: Annotated[bool, typer.Option(help="Also pairs whose two orders contradict each other.")] = False,
    ties: Annotated[bool, typer.Option(help="Also ties.")] = False,
    one_order: Annotated[bool, typer.Option(help="Also pairs with a verdict in one order only.")] = True,
    canaries: Annotated[bool, typer.Option(help="Also pairs made up to test the judge.")] = False,
    min_preference: Annotated[float, number(help="Least strength of preference, 0 to 1.", least=0, most=1)] = 0.0,
    overwrite: options.Overwrite = False,
) -> None:
    """Export preferences as JSON Lines that TRL and `rmcore train` read: prompt, chosen, rejected, and what is known.

    Both orders of a pair are one row. Its preference is their mean: 1 where both agree, 0.5 where one is a tie. Rows
    with a preference of 0 (flips and ties) have no better response; with --flips or --ties they come along, marked.
    A call of the store that cannot be read is named and left out; the exit code is 2 then, and all others are written.
    """
    with reported_errors():
        check_file(out, inputs=[options.store_file(store)], overwrite=overwrite, resumable=False)
        if not 0 <= min_preference <= 1:
            raise InputError(f"--min-preference: got {min_preference}, expected a number in [0, 1]")
    with _opened(store) as ledger, opened_output(out) as rows, progress_bar() as bar:
        task = bar.add_task("pairs", total=None, visible=out != "-")
        left_out: Counter[str] = Counter()
        damage = _Damage()
        for pair in ledger.pairs(model=model, canaries=canaries, unreadable=damage):
            why = _why_not(pair, flips, ties, one_order, min_preference)
            if why:
                left_out[why] += 1
                continue
            # ASCII: safe on a terminal, which stdout may be.
            rows.stream.write(json.dumps(pair.to_row(), allow_nan=False) + "\n")
            rows.count += 1
            bar.update(task, completed=rows.count)
        notes = "".join(f", {count} {why}" for why, count in sorted(left_out.items()))
        notes += f", {damage.rows} unreadable" if damage.rows else ""
        if rows.count or left_out or not damage.rows:
            typer.echo(f"{rows.count} rows{notes and '; left out' + notes[1:]}", err=True)
    damage.report()


@app.command()
def stats(
    store: Store,
    prices: Prices = None,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Count calls, verdicts, failures, flips, tokens and costs, in all and day by day.

    A call that cannot be read is named and not counted; the exit code is 2 then.
    """
    damage = _Damage()
    with _opened(store) as ledger:
        from rmcore.judge.store.prices import PriceTable

        table = None
        if prices is not None:
            with reading("--prices", prices):
                table = PriceTable.from_file(prices)
        told = ledger.stats(table, unreadable=damage)
        told["unreadable"] = damage.rows
        if as_json:
            typer.echo(json.dumps(told, indent=2, allow_nan=False))
        else:
            _print_stats(told)
    damage.report()


@app.command()
def quality(
    stores: Annotated[list[str], typer.Argument(help="Verdict stores; those of several judges together.")],
    replicates: Annotated[int, number(help="Bootstrap replicates, over pairs.", least=0)] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Measure judges without knowing the answers: both orders, their own repetitions, and each other.

    Accuracy is Dawid & Skene's estimate from pairs that three judges or more voted on; judges that share their mistakes
    look better than they are.

    Example: `rmcore verdicts quality gpt.db llama.db qwen.db`
    """
    from rmcore.cli.console import print_markdown
    from rmcore.evaluation.judge_quality import judge_quality, stored_votes

    damage = _Damage()
    votes = []
    for store in stores:
        with _opened(store) as ledger:
            votes += stored_votes(ledger, unreadable=damage)
    with reported_errors():
        if not votes:
            raise InputError(f"STORE: got {len(stores)} without a verdict, expected at least one verdict")
        told = judge_quality(votes, replicates=replicates)
    if as_json:
        typer.echo(json.dumps(told.to_dict(), indent=2, allow_nan=False))
    else:
        print_markdown(told.to_markdown())
    damage.report()


@app.command("critique-stats")
def critique_stats(
    store: Store,
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object, keys of contradictions too.")] = False,
) -> None:
    """Count what judges and critics wrote: length, sections, repeats, junk, and words that contradict their verdict.

    A contradiction is a comparison that says "the first response is better" beside a verdict for the second. Most
    critiques say no such sentence: they are silent.
    """
    damage = _Damage()
    with _opened(store) as ledger:
        from rmcore.judge.critics.stats import stored_critique_stats

        found = stored_critique_stats(ledger, model=model, unreadable=damage)
        if as_json:
            typer.echo(json.dumps({name: own.to_dict() for name, own in found.items()}, indent=2, allow_nan=False))
        else:
            for name, own in found.items():
                _print_critiques(name, own.to_dict())
    damage.report()


# -- helpers ---------------------------------------------------------------------------------------------------------


class _Damage:
    """Rows of a store that cannot be read: each is named at once, and the command ends with exit code 2."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, error: StoreError) -> None:
        self.rows += 1
        print_error(error)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """For work on one row."""
        from rmcore.judge.store.database import StoreError

        try:
            yield
        except StoreError as error:
            self(error)

    def report(self) -> None:
        """To be called at the end."""
        if self.rows:
            raise typer.Exit(2)


def printable(text: object, *, lines: bool = False) -> str:
    """``text`` with everything a terminal might obey or hide behind (escapes, bidi marks, zero widths) made visible.

    With ``lines``, line ends stay.
    """
    return "".join(c if c.isprintable() or (lines and c == "\n") else _escape(c) for c in str(text))


def _escape(char: str) -> str:
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(char) or char.encode("unicode_escape").decode("ascii")


def _why_not(pair: JudgedPair, flips: bool, ties: bool, one_order: bool, least: float) -> str:
    preference, flipped = pair.verdict.preference, pair.verdict.flipped
    if preference is None:
        return "without a verdict"
    if preference == 0 and flipped:
        return "" if flips else "flips"
    if preference == 0:
        return "" if ties else "ties"
    if pair.orders < 2 and not one_order:
        return "in one order only"
    return "too weak" if abs(preference) < least else ""


def _print_table(ledger: VerdictLedger, calls: list[LoggedCall], damage: _Damage) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, right in (("key", 0), ("at (UTC)", 0), ("model", 0), ("shown", 0), ("verdict", 0), ("tokens", 1)):
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    table.add_column("s", justify="right", no_wrap=True)
    table.add_column("cost", justify="right", no_wrap=True)
    table.add_column("prompt", overflow="ellipsis", no_wrap=True)
    # A reader behind a pipe gets everything; a terminal what fits.
    cut = sys.stdout.isatty()
    for call in calls:
        prompt = ""
        with damage.noted():
            prompt = ledger.texts(call)["prompt"]
        last = prompt if isinstance(prompt, str) else message_text(prompt[-1])
        cells = (
            call.key[:12] if cut else call.key,
            call.at[:19].replace("T", " "),
            call.answering[:24] if cut else call.answering,
            call.shown,
            _verdict(call) if cut else _verdict(call, None, None),
            call.prompt_tokens + call.completion_tokens,
            f"{call.seconds:.1f}",
            "?" if call.cost is None else f"{call.cost:.4g}",
            str(last)[:200] if cut else str(last),
        )
        # Text, not str: brackets in stored words are not rich's markup.
        table.add_row(*(Text(printable(cell)) for cell in cells))
    results_console(_UNCUT).print(table)


def _verdict(call: LoggedCall, reason: int | None = 40, note: int | None = 30) -> str:
    if call.preference is None:
        return f"none: {call.reason[:reason]}"
    soft = "" if call.preference in (-1, 0, 1) else f" {call.preference:+.2f}"
    return call.outcome + soft + (f" ({call.reason[:note]})" if call.reason else "")


def _print_call(ledger: VerdictLedger, call: LoggedCall) -> None:
    said = ledger.texts(call)
    facts = {
        "key": call.key,
        "pair": f"{call.pair}, shown {call.shown}" + (", a canary" if call.canary else ""),
        "at": f"{call.at}, rmcore {call.version}",
        "judge": f"{call.judge}, model {call.model}, template {call.template}",
        "answered": f"{call.answered or 'not said by whom'}, fingerprint {call.fingerprint or 'none'}",
        "parameters": json.dumps(said["parameters"]),
        "verdict": f"{_verdict(call)} (from the side of the response shown first)",
        "usage": f"{call.attempts} attempts, {call.seconds:.2f} s, {call.prompt_tokens} prompt tokens "
        f"({call.cached_tokens} cached), {call.completion_tokens} completion ({call.reasoning_tokens} reasoning), cost "
        + ("unknown" if call.cost is None else f"{call.cost:.6g} {call.currency}".strip()),
        "sanitised": f"{call.sanitised} control sequences in the texts",
        "cut": "characters not shown: {} of the prompt, {} of the first, {} of the second".format(*call.characters_cut),
        "labels": json.dumps(said["labels"]),
    }
    for name, value in facts.items():
        typer.echo(f"{name + ':':<12} {printable(value)}")
    prompt = said["prompt"]
    if not isinstance(prompt, str):
        prompt = "\n".join(f"[{message['role']}] {message_text(message)}" for message in prompt)
    cut = f" ({call.reply_cut} more characters were not kept)" if call.reply_cut else ""
    sections = {
        "prompt": prompt,
        "shown first": response_text(said["first"]),
        "shown second": response_text(said["second"]),
    }
    for name, text in (sections | {f"reply{cut}": said["reply"]}).items():
        # Every line is set in, so that no text can pass itself off as one of these headings.
        body = "\n".join("  " + line for line in printable(text, lines=True).split("\n"))
        typer.echo(f"\n{name}:\n{body}")
    typer.echo("")


def _print_stats(told: dict[str, Any]) -> None:
    pairs, latency, file = told["pairs"], told["latency_s"], told["file"]
    cost = ", ".join(f"{amount:.6g} {currency}".strip() for currency, amount in told["cost"].items()) or "0"
    rows = {
        "calls": f"{told['calls']} ({told['questions']} questions, {told['retries']} retries, {told['canaries']} "
        "canaries)",
        "models": _counts(told["models"]),
        "verdicts": _counts(told["outcomes"]),
        "no verdict": _counts(told["reasons"]),
        "shown first": _counts(told["shown_first"]),
        "pairs": f"{pairs['judged']} ({pairs['both_orders']} in both orders): {pairs['decided']} decided, "
        f"{pairs['flips']} flips, {pairs['ties']} ties, {pairs['failed']} failed",
        "tokens": f"{told['prompt_tokens']} prompt ({told['cached_tokens']} cached), {told['completion_tokens']} "
        f"completion ({told['reasoning_tokens']} reasoning)",
        "cost": f"{cost}" + (f", and {told['unpriced_calls']} calls of unknown cost" * bool(told["unpriced_calls"])),
        "latency": "no calls"
        if latency["p50"] is None
        else f"p50 {latency['p50']:.2f} s, p95 {latency['p95']:.2f} s, retries included",
        "sanitised": f"{told['sanitised']} control sequences",
        "cut": f"{told['cut']} calls that were too long for the judge",
        "unreadable": f"{told['unreadable']} calls",
        "file": f"{file['bytes'] / 1e6:.1f} MB, {file['texts']} texts",
    }
    for name, value in rows.items():
        typer.echo(f"{name + ':':<13} {printable(value)}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("day (UTC)", "calls", "prompt tokens", "completion tokens", "cost", "unpriced"):
        table.add_column(name, justify="left" if name.startswith("day") else "right")
    for day, sums in told["days"].items():
        money = ", ".join(f"{amount:.6g} {currency}".strip() for currency, amount in sums["cost"].items()) or "0"
        numbers = (sums["calls"], sums["prompt_tokens"], sums["completion_tokens"], money, sums["unpriced_calls"])
        table.add_row(Text(printable(day)), *(Text(printable(number)) for number in numbers))
    if told["days"]:
        results_console(160).print(table)


def _print_critiques(name: str, told: dict[str, Any]) -> None:
    def spread(values: dict[str, float | None]) -> str:
        shown = {word: "–" if value is None else f"{value:.0f}" for word, value in values.items()}
        return f"mean {shown['mean']}, median {shown['p50']}, 95% below {shown['p95']}"

    rows = {
        "model": name or "not said",
        "critiques": f"{told['critiques']}, and {told['empty']} answers without one; {told['repeated']} said before",
        "words": spread(told["words"]),
        "sections": spread(told["sections"]),
        "junk": _counts(told["junk"]),
        "beside verdict": _counts(told["stated"]),
    }
    for title, value in rows.items():
        typer.echo(f"{title + ':':<15} {printable(value)}")
    typer.echo("")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


@contextmanager
def _opened(path: str) -> Iterator[VerdictLedger]:
    """The store, with errors as the other commands report them."""
    from rmcore.judge.store.ledger import VerdictLedger

    with reported_errors(), VerdictLedger(path) as ledger:
        yield ledger
