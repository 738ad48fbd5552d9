"""Options that several commands share: which pairs go to a judge, which judge, and what it may cost."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer
from typer.core import TyperCommand

from rmcore.cli.files import file_read
from rmcore.cli.numbers import number

T = TypeVar("T")

Model = Annotated[str, typer.Argument(help="A folder written by rmcore train or upgrade, or a hub name.")]
Device = Annotated[str | None, typer.Option(help="torch device; default: cuda if there is one.")]
AttnImplementation = Annotated[
    str, typer.Option(help="Attention of the backbone: auto, or what transformers calls attn_implementation.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the Python files that come with the model: they can do all you can."),
]
Deterministic = Annotated[
    Literal["batch"] | None,
    typer.Option(
        help="batch: a score has the same bits whatever is scored with it; no batches, no shared prefixes, so slower."
    ),
]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Keep no encoded texts for later runs, and use none (folder: RMCORE_CACHE).")
]
MaxLength = Annotated[
    int | None,
    number(
        help="Most tokens a text may have; default: what the model was saved with.",
        least=1,
        expected="a positive number of tokens",
    ),
]
# Choices are written out here, not imported, so that --help does not wait for torch; mypy and a test hold them to the
# types of the library's functions.
Overlong = Annotated[
    Literal["error", "truncate-prompt-left", "truncate-right", "truncate-longest", "no-reward"] | None,
    typer.Option(help="What to do with longer texts; default: what the model was saved with."),
]
Backend = Annotated[Literal["auto", "torch", "cpu", "triton", "cuda"], typer.Option(help="Kernels.")]

Uncertainty = Annotated[
    Literal["head", "sngp", "laplace", "laplace-kron", "laplace-diag", "dropout", "ensemble", "urm", "urme", "sngp-urm"]
    | None,
    typer.Option(
        help="Whose g, v and preference: the model's head, or one fitted beside it (rmcore train --uncertainty). "
        "Default: what the model is served with."
    ),
]
Variance = Annotated[
    Literal["epistemic", "aleatoric", "total"] | None,
    typer.Option(
        help="Which part of the variance u is made of: what more data would tell, what is in the answers, or both. "
        "Default: all that the uncertainty tells by itself."
    ),
]

Columns = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=COLUMN ...", help="Other names of columns: prompt=question chosen=good."),
]
Critiques = Annotated[
    bool,
    typer.Option(
        "--critiques", help="Read each response behind its critiques, the column critiques (rmcore critique writes it)."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what --out names.")]

Threshold = Annotated[float | None, number(help="Route pairs whose score exceeds this.")]
BudgetFraction = Annotated[
    float | None, number(help="Route this fraction of the pairs of each batch.", least=0, most=1)
]
JudgeFraction = Annotated[
    float | None,
    number(help="Route this fraction of all pairs by a threshold that follows their scores.", least=0, most=1),
]
MaxCalls = Annotated[int | None, number(help="Never more judge calls; rmcore score: with --judge-fraction.", least=0)]
MaxTokens = Annotated[int | None, number(help="Never more judge tokens; rmcore score: with --judge-fraction.", least=0)]
MaxCost = Annotated[
    float | None, number(help="With --prices: never more money; rmcore score: with --judge-fraction.", least=0)
]
RouterState = Annotated[
    Path | None, typer.Option(help="With --judge-fraction: file to continue from, if there, and to save to.")
]
RankBy = Annotated[
    Literal["learned", "u", "margin", "error_probability", "novelty", "rank_sum"] | None,
    typer.Option(
        help="What makes a pair worth a judge call. Default: learned, P(the head is wrong) as the verdicts teach it; "
        "with --threshold u, as in the paper."
    ),
]
JudgeUrl = Annotated[str | None, typer.Option(help="OpenAI-compatible base URL of the judge.")]
JudgeModel = Annotated[str, typer.Option(help="The judge's model name.")]
JudgeKeyEnv = Annotated[str, typer.Option(help="Environment variable with its key; empty for none.")]
JudgeKind = Annotated[
    Literal["chat", "genrm"],
    typer.Option(help="genrm: a generative reward model with the roles response_1 and response_2 (NeMo-Gym)."),
]
JudgePrinciple = Annotated[str, typer.Option(help="With --judge-kind genrm: what to judge by, in its role principle.")]
JudgeOrders = Annotated[Literal["both", "one"], typer.Option(help="Ask both orders of a pair, or one.")]
JudgeSoft = Annotated[bool, typer.Option(help="Read soft verdicts from the judge's token probabilities.")]
JudgeMinMass = Annotated[
    float,
    number(
        help="Of soft verdicts: probability of the verdict's words together below which one counts for less, and is no "
        "label; 0 for never.",
        least=0,
        most=1,
    ),
]
JudgeOutput = Annotated[
    Literal["text", "json_schema"],
    typer.Option(
        help="How the judge answers: text that ends with its verdict, or a JSON object under a strict schema "
        "(response_format), in text after all where the endpoint refuses that."
    ),
]
JudgeTemplate = Annotated[Path | None, file_read(help="Text file with the question's template.")]
JudgeMaxTokens = Annotated[
    int, number(help="Longest answer in tokens, reasoning included; 0 leaves it to the endpoint.", least=0)
]
JudgeContext = Annotated[
    int | None,
    number(
        help="Tokens that the judge's model takes, question and answer together: longer pairs are cut in the middle. "
        "Default: what the server says.",
        least=1,
    ),
]
JudgeTimeout = Annotated[float, number(help="Seconds for one request and its whole reply.", above=0)]
JudgeConcurrency = Annotated[int, number(help="Requests in flight at most; it begins low and grows.", least=1)]
JudgeRetries = Annotated[int, number(help="How often a request that failed is tried again.", least=0)]
JudgeMaxReply = Annotated[int, number(help="Bytes of a reply; longer ones are dropped.", least=1)]
Reuse = Annotated[
    Literal["replies", "verdicts"],
    typer.Option(help="What of --store answers again: all replies, or those with a verdict only."),
]
AskAgain = Annotated[
    list[str] | None,
    typer.Option(
        help="Ask again what --store holds without a verdict for this reason: length, filter, refusal, no_content, "
        "conflicting or unparsable; may be given several times."
    ),
]
JudgeDeadline = Annotated[
    float | None, number(help="Seconds from the start of a batch after which verdicts are of no use.", above=0)
]
JudgeRpm = Annotated[
    int | None, number(help="Requests a minute at most; with a --store in PostgreSQL over all its processes.", least=1)
]
JudgeTpm = Annotated[int | None, number(help="Tokens a minute at most; likewise.", least=1)]
Run = Annotated[
    str | None,
    typer.Option(
        help="With a --store in PostgreSQL: --max-calls and --max-tokens hold over all processes of this name together."
    ),
]
Store = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|URL",
        help="Verdict store: what is in it is not bought again. A file, or for several machines "
        "postgresql://[user@]host[:port]/database (password: PGPASSWORD or pgpass).",
    ),
]
Prices = Annotated[Path | None, file_read(help="JSON price table of the judge's models, for costs.")]
Verdicts = Annotated[Path | None, file_read(help="Replay recorded verdicts (JSONL) instead of asking.")]


def store_file(store: str | None) -> Path | None:
    """The file that a store is in; None if it is in none."""
    from rmcore.judge.store.location import is_url

    return None if store is None or is_url(store) else Path(store)


@dataclass(frozen=True)
class Loading:
    """The options of every command that loads a model and keeps what it encodes."""

    device: Device = None
    attn_implementation: AttnImplementation = "auto"
    trust_remote_code: TrustRemoteCode = False
    no_cache: NoCache = False
    max_length: MaxLength = None
    overlong: Overlong = None


@dataclass(frozen=True)
class Doubting:
    """The options of every command in which an uncertainty counts."""

    uncertainty: Uncertainty = None
    variance: Variance = None


@dataclass(frozen=True)
class Asking:
    """The options of every command that may ask a judge: which, how, and what it may cost."""

    max_calls: MaxCalls = None
    max_tokens: MaxTokens = None
    max_cost: MaxCost = None
    judge_url: JudgeUrl = None
    judge_model: JudgeModel = ""
    judge_key_env: JudgeKeyEnv = "OPENAI_API_KEY"
    judge_kind: JudgeKind = "chat"
    judge_principle: JudgePrinciple = ""
    judge_orders: JudgeOrders = "both"
    judge_output: JudgeOutput = "text"
    judge_soft: JudgeSoft = False
    judge_min_mass: JudgeMinMass = 0.5
    judge_template: JudgeTemplate = None
    judge_max_tokens: JudgeMaxTokens = 2048
    judge_context: JudgeContext = None
    judge_timeout: JudgeTimeout = 60.0
    judge_concurrency: JudgeConcurrency = 16
    judge_retries: JudgeRetries = 4
    judge_max_reply: JudgeMaxReply = 4 << 20
    judge_requests_per_minute: JudgeRpm = None
    judge_tokens_per_minute: JudgeTpm = None
    run: Run = None
    store: Store = None
    reuse: Reuse = "replies"
    ask_again: AskAgain = None
    prices: Prices = None
    verdicts: Verdicts = None


@dataclass(frozen=True)
class Judging(Asking):
    """The options of every command that routes pairs to a judge; :func:`with_options` gives them to a command."""

    threshold: Threshold = None
    budget: BudgetFraction = None
    judge_fraction: JudgeFraction = None
    router_state: RouterState = None
    rank_by: RankBy = None
    judge_deadline: JudgeDeadline = None


class ManyColumns(TyperCommand):
    """A command whose ``--columns`` takes all that follow it in the form NAME=COLUMN."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """``--columns a=b c=d`` as ``--columns a=b --columns c=d``, which is what click knows."""
        spread: list[str] = []
        within = False
        for k, arg in enumerate(args):
            if within and args[k - 1] != "--columns":
                within = re.fullmatch(r"[A-Za-z_0-9]+=.+", arg) is not None
                spread += ["--columns"] if within else []
            within = within or arg == "--columns"
            spread.append(arg)
        return super().parse_args(ctx, spread)


def with_options(command: Callable[..., T]) -> Callable[..., T]:
    """A command for typer in which each parameter of a dataclass type (:class:`Judging`, :class:`Loading`) is spread
    into its fields.

    typer knows single options only; this way a group of them is written down once.
    """
    spread: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for own in inspect.signature(command, eval_str=True).parameters.values():
        if not dataclasses.is_dataclass(own.annotation):
            parameters.append(own.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        spread[own.name] = own.annotation
        hints = get_type_hints(own.annotation, include_extras=True)
        parameters += [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if f.default is dataclasses.MISSING else f.default,
                annotation=hints[f.name],
            )
            for f in dataclasses.fields(own.annotation)
        ]

    @functools.wraps(command)
    def gathered(**given: Any) -> T:
        for name, group in spread.items():
            given[name] = group(**{f.name: given.pop(f.name) for f in dataclasses.fields(group)})
        return command(**given)

    return with_parameters(gathered, parameters)


def with_parameters(command: Callable[..., T], parameters: list[inspect.Parameter]) -> Callable[..., T]:
    """``command``, which takes keyword arguments, with the parameters that typer is to see."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command
