"""``rmcore critique``: critiques of responses, beside them in their rows, for ``--critiques`` elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmcore._base.errors import InputError, JudgeError, reject
from rmcore.cli import options
from rmcore.cli.accounts import room_in_words
from rmcore.cli.build_engine import check_key, make_budgets, make_judge
from rmcore.cli.console import judge_progress, notes, progress_bar, reported_errors
from rmcore.cli.critique_rows import FAILURES, Done, RowParts, parts_of, rows_behind, written
from rmcore.cli.files import file_read, reading
from rmcore.cli.judge_options import as_options
from rmcore.cli.numbers import number
from rmcore.cli.output import Output, check_apart, check_file, opened_output
from rmcore.cli.records import Chain, model_identity, settings_digest

if TYPE_CHECKING:
    from rmcore.engine.routing import Budget
    from rmcore.judge.critics.critique import Critic, Critique
    from rmcore.model.data import Row
    from rmcore.model.text import TextEncoder

__all__ = ["critique"]

_CHUNK = 16


@dataclass(frozen=True)
class Critics:
    """Who writes them, besides an endpoint (``--judge-url``)."""

    from_store: Annotated[
        Path | None, file_read(help="Take what is written in this verdict store, of judges and critics; no call.")
    ] = None
    generate: Annotated[
        str | None,
        typer.Option(
            help="A causal language model, in this process: hub name, folder or GGUF file; or a reward model on one, "
            "CLoud's or rmcore's."
        ),
    ] = None
    samples: Annotated[int, number(help="Critiques a response.", least=1)] = 1
    max_chars: Annotated[int, number(help="Longest critique, in characters; more is cut and counted.", least=1)] = 4096
    temperature: Annotated[
        float | None, number(help="Of sampling; default: the endpoint's, 0.7 with --generate.", least=0)
    ] = None
    max_tokens_generated: Annotated[
        int,
        number(help="Longest critique in tokens with --generate (of an endpoint: --judge-max-tokens).", least=1),
    ] = 256
    drop_junk: Annotated[
        bool, typer.Option("--drop-junk", help="Leave out critiques that are empty, a few words, a loop or an echo.")
    ] = False
    seed: Annotated[int, number(help="Of sampling with --generate.", least=0)] = 0


@dataclass(frozen=True)
class CriticAsking(options.Asking):
    """The judge's options, with a shorter answer by default."""

    judge_max_tokens: options.JudgeMaxTokens = 512


@options.with_options
def critique(
    *,
    rows: Annotated[
        str, typer.Argument(help="Prompts with responses, or preferences: a file, - or hf://org/name:split.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Where rows go; - for stdout.")] = "-",
    overwrite: options.Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the rows in --out end, of an interrupted run too.")
    ] = False,
    columns: options.Columns = None,
    critics: Critics,
    asking: CriticAsking,
    device: options.Device = None,
) -> None:
    """Write critiques of responses: by an endpoint, out of a verdict store, or by a language model in this process.

    Each row is written as it came, with `critiques` beside its responses. What failed and what is junk is counted; a
    row is written whatever became of its critiques. An endpoint's are kept in --store and bought once.

    Example: `rmcore critique groups.jsonl --judge-url http://localhost:8000/v1 --judge-model critic --judge-key-env ''
    --store critiques.db -o with-critiques.jsonl`, then `rmcore score my-rm with-critiques.jsonl --critiques`
    """
    with reported_errors():
        from rmcore.model.data import parse_columns, read_rows

        kept = [asking.store, critics.from_store]
        check_file(out, inputs=[rows, *kept], overwrite=overwrite, resume=resume)
        check_apart("--store", asking.store, [rows, out])
        names = parse_columns(columns or [])
        critic, budgets = _critic(critics, asking, device)
        told = _Told()
        try:
            with opened_output(out, resume=resume) as output, progress_bar() as bar, judge_progress(bar, critic):
                output.chain = Chain(_run_digest(critics, asking, names))
                known = Done()
                todo = rows_behind(read_rows(rows), output.done(), out, output.chain, known)
                first = list(islice(todo, 1))  # now all results that are there were looked at
                _mend(output, known, names, critic, budgets, told, critics.drop_junk)
                task = bar.add_task("rows", total=None)
                for row, (read, found) in _criticised(chain(first, todo), names, critic, budgets, told):
                    told.note(found)
                    output.write(written(row, read, found, drop_junk=critics.drop_junk))
                    output.flush()
                    bar.update(task, completed=output.count)
                if told.left:
                    why = room_in_words(budgets)
                    raise JudgeError(
                        f"the budget ended before the rows did ({why}); --resume goes on, with another budget"
                    )
        finally:
            _close(critic)
            told.say()
        if told.responses and not told.texts:
            raise JudgeError(f"no critique of any of {told.responses} responses")


@dataclass
class _Told:
    """What became of everything."""

    responses: int = 0
    texts: int = 0
    cut: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    junk: Counter[str] = field(default_factory=Counter)
    usages: list[Any] = field(default_factory=list)
    left: bool = False

    def note(self, row: Sequence[Sequence[Critique]]) -> None:
        """Count what became of a row's responses."""
        for own in row:
            self._note(own)

    def _note(self, found: Sequence[Critique]) -> None:
        self.responses += 1
        self.reasons.update(one.reason for one in found if one.reason)
        self.reasons.update(["nothing stored"] * (not found))
        self.junk.update(one.junk for one in found if one.junk)
        self.texts += sum(not one.failed for one in found)
        self.cut += sum(one.cut > 0 for one in found)
        self.usages += [one.usage for one in found]

    def say(self) -> None:
        from rmcore.judge.base import JudgeUsage

        usage = JudgeUsage.total(self.usages)
        parts = [f"{self.texts} critiques of {self.responses} responses"]
        for name, counts in (("notes", self.reasons), ("junk", self.junk)):
            if counts:
                parts.append(f"{name}: " + ", ".join(f"{count} {why}" for why, count in counts.most_common()))
        if self.cut:
            parts.append(f"{self.cut} cut to --max-chars")
        parts.append(
            f"{usage.calls} calls ({usage.cache_hits} from the store), {usage.prompt_tokens} prompt and "
            f"{usage.completion_tokens} completion tokens, cost {usage.cost:.6g}"
            + f" and {usage.unpriced_calls} calls of unknown cost"
            * bool(usage.unpriced_calls)
        )
        notes.print("; ".join(parts), markup=False, highlight=False, soft_wrap=True)


def _mend(
    output: Output,
    known: Done,
    names: dict[str, str],
    critic: Critic,
    budgets: list[Budget],
    told: _Told,
    drop_junk: bool,
) -> None:
    """Ask again for what failed on its way in an earlier run, and put it where it belongs."""
    again: dict[int, dict[str, Any]] = {}
    mended = 0
    try:
        for row, (read, found) in _criticised(iter(known.failed), names, critic, budgets, told):
            told.note(found)
            again[row.number] = written(row, read, found, drop_junk=drop_junk)
            mended += FAILURES not in again[row.number]
    finally:  # what was bought is kept, however this ends
        if again:
            output.rewrite(known.rewritten(output.done(), again))
            said = f"asked {len(again)} rows again whose critiques had failed: {mended} of them are whole now"
            notes.print(said, markup=False, highlight=False, soft_wrap=True)


def _run_digest(critics: Critics, asking: CriticAsking, names: dict[str, str]) -> str:
    """Of what decides critiques besides their row: the critic, not where it is or what it may cost."""
    template = asking.judge_template
    settings = {
        "command": "critique",
        "from_store": critics.from_store is not None,
        "model": asking.judge_model,
        "template": None if template is None else template.read_text(encoding="utf-8"),
        "max_tokens": asking.judge_max_tokens if critics.generate is None else critics.max_tokens_generated,
        "seed": critics.seed if critics.generate is not None else None,
        "columns": sorted(names.items()),
        **{name: getattr(critics, name) for name in ("samples", "max_chars", "temperature", "drop_junk")},
    }
    return settings_digest("" if critics.generate is None else model_identity(critics.generate), settings)


def _critic(critics: Critics, asking: CriticAsking, device: str | None) -> tuple[Critic, list[Budget]]:
    """The one critic that the options name, and what it may cost."""
    given = [asking.judge_url, critics.from_store, critics.generate]
    if sum(one is not None for one in given) != 1:
        got = "none" if not any(given) else "several"
        reject("--judge-url, --from-store, --generate", got, "one of them")
    if asking.verdicts is not None or asking.judge_soft or asking.judge_orders != "both":
        reject("--verdicts, --judge-soft, --judge-orders", "given", "none: a critic gives no verdict")
    if asking.reuse != "replies" or "unparsable" in (asking.ask_again or ()):
        # To a store a critique is an answer without a verdict: all would be bought again.
        reject("--reuse verdicts, --ask-again unparsable", "given", "neither: a critic gives no verdict")
    if asking.judge_url is None and (asking.max_calls, asking.max_tokens, asking.max_cost) != (None, None, None):
        reject("--max-calls, --max-tokens, --max-cost", "without --judge-url", "together with it")
    if critics.from_store is not None:
        from rmcore.judge.critics.stored import StoredCritiques

        model = asking.judge_model or None
        samples = critics.samples if critics.samples > 1 else None
        return StoredCritiques(critics.from_store, model=model, samples=samples, max_chars=critics.max_chars), []
    if critics.generate is not None:
        return _own(critics, critics.generate, device), []
    check_key(asking)
    return _chat(critics, asking), make_budgets(replace(asking, judge_orders="one"))


def _chat(critics: Critics, asking: CriticAsking) -> Critic:
    from rmcore.judge.critics.chat import ChatCritic, CriticPrompt

    template = asking.judge_template
    prompt = CriticPrompt()
    if template is not None:
        named = {f"template{part}": "--judge-template" for part in ("", " user", " system")}
        with as_options(**named), reading("--judge-template", template):
            prompt = CriticPrompt.from_file(template)
    judge: Any = make_judge(replace(asking, judge_template=None))  # checks the options, and makes what is shared
    return ChatCritic(
        asking.judge_url,
        asking.judge_model,
        asking.judge_key_env or None,
        samples=critics.samples,
        prompt=prompt,
        max_chars=critics.max_chars,
        client=judge.client.options,
        store=judge.store,
        prices=judge.prices,
        # Nobody waits for one chunk: a slow server's critiques come late, and a dead one has its time-out and breaker.
        deadline_s=None,
        context_tokens=asking.judge_context,
        max_tokens=asking.judge_max_tokens or None,
        temperature=critics.temperature if critics.temperature is not None or critics.samples == 1 else 1.0,
    )


def _own(critics: Critics, name: str, device: str | None) -> Critic:
    from rmcore.engine.own_critic import OwnCritic

    model, encoder = _language_model(name, device)
    temperature = 0.7 if critics.temperature is None else critics.temperature
    return OwnCritic(
        model,
        encoder,
        samples=critics.samples,
        max_new_tokens=critics.max_tokens_generated,
        temperature=temperature,
        seed=critics.seed,
        max_chars=critics.max_chars,
    )


def _language_model(name: str, device: str | None) -> tuple[Any, TextEncoder]:
    """What generates, and how it reads: of a model of rmcore's and of a published CLoud model, their own body."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rmcore.cli.load_model import reward_backbone
    from rmcore.model.devices import checked_device
    from rmcore.model.language_model import language_model
    from rmcore.model.text import TextEncoder

    backbone = reward_backbone(name, device)
    if backbone is not None:
        return language_model(backbone), backbone.encoder
    place, more = name, {}
    if name.endswith(".gguf"):
        place, more = str(Path(name).parent), {"gguf_file": Path(name).name}
    try:
        model = AutoModelForCausalLM.from_pretrained(place, **more).to(checked_device(device))
        tokenizer = AutoTokenizer.from_pretrained(place, **more)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"--generate: got {name!r}, which cannot be loaded ({str(error)[:300]})") from error
    return model, TextEncoder(tokenizer)


def _close(critic: Critic) -> None:
    from rmcore._base.loop import run_sync

    close = getattr(critic, "aclose", None)
    if close is not None:
        run_sync(close())
    store = getattr(critic, "store", None)
    if store is not None:
        store.close()


def _criticised(
    rows: Iterator[Row],
    names: dict[str, str],
    critic: Critic,
    budgets: list[Budget],
    told: _Told,
) -> Iterator[tuple[Row, tuple[RowParts, list[tuple[Critique, ...]]]]]:
    """Rows with the critiques of their responses, as far as the budgets go."""
    from rmcore._base.loop import run_sync
    from rmcore.judge.base import JudgeUsage

    while chunk := list(islice(rows, _CHUNK)):
        read = [parts_of(row, names) for row in chunk]
        items = [(prompt, response) for parts in read for prompt, response in parts.items]
        samples = getattr(critic, "samples", None) or 1
        held = [budget.reserve(len(items) * samples) for budget in budgets]
        granted = min([len(items) * samples, *(one.pairs for one in held)])
        if granted < len(items) * samples:
            for budget, one in zip(budgets, held, strict=True):
                budget.settle(one, JudgeUsage())
            told.left = True
            return
        found = run_sync(critic.critiques(items))
        usage = JudgeUsage.total(one.usage for own in found for one in own)
        for budget, one in zip(budgets, held, strict=True):
            budget.settle(one, usage)
        left = iter(found)
        for row, parts in zip(chunk, read, strict=True):
            yield row, (parts, list(islice(left, len(parts.items))))
