"""The reward engine that a command's options name: a model, a router and a judge."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from rmcore._base.errors import reject
from rmcore.cli.checks import check_backend, check_device, check_writable
from rmcore.cli.files import reading
from rmcore.cli.judge_options import as_options, is_given, reject_unused
from rmcore.cli.model_checks import check_options
from rmcore.cli.options import Asking, Doubting, Judging, store_file

if TYPE_CHECKING:
    from rmcore.engine.engine import RewardEngine
    from rmcore.engine.routing import AdaptiveRouter, Budget, PairScore, RankBy, Router
    from rmcore.judge import VerdictStore
    from rmcore.judge.base import Judge
    from rmcore.judge.question.constitution import Constitution
    from rmcore.judge.store.prices import PriceTable
    from rmcore.model.backbone import Deterministic
    from rmcore.model.error_prior import ErrorPrior
    from rmcore.model.text import OverlongPolicy
    from rmcore.ops.dispatch import Backend

__all__ = ["check_key", "check_routing", "close_engine", "make_budgets", "make_engine", "make_judge", "make_prices"]


def make_engine(
    model: str,
    judging: Judging,
    *,
    backend: Backend,
    device: str | None,
    attn_implementation: str = "auto",
    trust_remote_code: bool = False,
    deterministic: Deterministic | None = None,
    max_length: int | None = None,
    overlong: OverlongPolicy | None = None,
    design: str = "all",
    doubting: Doubting | None = None,
    shared_judge: Judge | None = None,
) -> tuple[RewardEngine, Callable[[], None]]:
    """The engine, and what saves its router's state where --router-state asks for that.

    What is wrong with the options is found before the model is loaded. :func:`close_engine` is the caller's to call.
    ``shared_judge`` stands for the judge they name, which somebody else has made.
    """
    from rmcore.engine.comparisons import parse_design
    from rmcore.engine.engine import RewardEngine
    from rmcore.model.reward_model import RewardModel

    parse_design(design, "--design")
    check_writable(judging.router_state, "--router-state")
    doubting = doubting or Doubting()
    adaptive = _adaptive_router(judging)
    router = _router(judging, adaptive)
    judge = make_judge(judging) if shared_judge is None else shared_judge
    _check_together(judging, judge, router)
    check_device(device)
    check_backend(model, backend, device)
    check_options(
        model,
        uncertainty=doubting.uncertainty,
        variance=doubting.variance,
        max_length=max_length,
        overlong=overlong,
        deterministic=deterministic,
        design=design,
        novelty=judge is not None and _rank_by(judging) == "novelty",
    )
    loaded = RewardModel.from_pretrained(
        model,
        device=device,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        deterministic=deterministic,
        max_length=max_length,
        overlong=overlong,
    )
    if loaded.error_prior is not None and _rank_by(judging) == "learned":
        adaptive = _adaptive_router(judging, loaded.error_prior)
        router = _router(judging, adaptive, loaded.error_prior)
    learned = adaptive is not None and _rank_by(judging) == "learned"
    if learned and adaptive is not None and judging.router_state is not None and judging.router_state.exists():
        adaptive.load(judging.router_state)
    engine = RewardEngine(
        loaded,
        judge,
        router,
        backend=backend,
        judge_deadline_s=judging.judge_deadline,
        design=design,
        uncertainty=doubting.uncertainty,
        variance=doubting.variance,
    )

    saving = threading.Lock()  # or of two batches that end at once the older state may be written last

    def save() -> None:
        if adaptive is not None and judging.router_state is not None:
            with saving:
                adaptive.save(judging.router_state)

    return engine, save


def _check_together(judging: Judging, judge: Judge | None, router: Router) -> None:
    """Raises InputError for options that would only be found useless, or wrong, once a model is loaded."""
    from rmcore.engine.routing import NeverRoute

    routing, asking = "--threshold, --budget or --judge-fraction", "--judge-url or --verdicts"
    if judge is None and not isinstance(router, NeverRoute):
        reject("judge", "None", f"{asking}, for the pairs that {type(router).__name__} routes")
    if judge is not None and isinstance(router, NeverRoute):
        reject(asking, f"one without {routing}, so that the judge is never asked", "one of them, or no judge")
    if isinstance(router, NeverRoute) and (is_given(judging, "rank_by") or is_given(judging, "judge_deadline")):
        reject("--rank-by, --judge-deadline", f"without {routing}", "together with one of them")
    deadline = judging.judge_deadline
    if deadline is not None and not (math.isfinite(deadline) and deadline > 0):
        reject("--judge-deadline", deadline, "seconds above 0")
    check_key(judging)


def check_routing(judging: Judging, asks: bool) -> None:
    """What :func:`make_engine` finds wrong with the options of routing, before anything is started elsewhere."""
    from rmcore.judge import RecordedJudge

    router = _router(judging, _adaptive_router(judging))
    _check_together(judging, RecordedJudge({}) if asks else None, router)


def check_key(judging: Asking) -> None:
    """Raises InputError where the judge's key is to be in a variable that is not set."""
    key = judging.judge_key_env
    value = os.environ.get(key, "").strip() if key else ""
    if judging.judge_url is not None and not (value.isascii() and value.isprintable()):
        reject("--judge-key-env", f"{key}, whose value cannot stand in a header", "a key in ASCII, on one line")
    if judging.judge_url is not None and key and not value:
        reject(
            "--judge-key-env",
            f"{key}, and no such variable is set",
            "the environment variable with the judge's key",
            "For a server without keys: --judge-key-env ''",
        )


def close_engine(engine: RewardEngine) -> None:
    """Close its judge: connections, and the store's file."""
    if engine.judge is not None:
        from rmcore._base.loop import run_sync
        from rmcore.judge.base import close_judge

        run_sync(close_judge(engine.judge))


def _rank_by(judging: Judging) -> str:
    """The score to route by: learned, but for a threshold, which is on the scale of u as in the paper."""
    return judging.rank_by or ("u" if judging.threshold is not None else "learned")


def _score(judging: Judging, prior: ErrorPrior | None) -> RankBy | PairScore:
    """The same as routers take it."""
    from rmcore.engine.routing import LearnedScore

    by = _rank_by(judging)
    return LearnedScore(prior) if by == "learned" else cast("RankBy", by)


def _adaptive_router(judging: Judging, prior: ErrorPrior | None = None) -> AdaptiveRouter | None:
    """The router of --judge-fraction, its state not loaded yet, or None where that is not given."""
    state = judging.router_state
    if judging.judge_fraction is None:
        own = (judging.max_calls, judging.max_tokens, judging.max_cost)
        if (judging.run is None and own != (None, None, None)) or state is not None:
            reject(
                "--max-calls, --max-tokens, --max-cost, --router-state",
                "without --judge-fraction",
                "together with it",
            )
        return None
    from rmcore.engine.routing import AdaptiveRouter
    from rmcore.engine.routing.state import read_state

    with as_options(target_fraction="--judge-fraction"):
        router = AdaptiveRouter(judging.judge_fraction, make_budgets(judging), by=_score(judging, prior))
    if state is not None and state.exists():
        read_state(state)  # what is no JSON is found before a model is loaded, the rest when the model's prior is known
        if _rank_by(judging) != "learned":
            router.load(state)
    return router


def make_budgets(judging: Asking) -> list[Budget]:
    """The limits of --max-calls, --max-tokens and --max-cost.

    Raises InputError for one that has no room for a single pair, unless --router-state may know what a pair costs.
    """
    from rmcore.engine.routing import Budget

    orders = 1 if judging.judge_orders == "one" else 2
    budgets: list[Budget] = []
    if judging.max_calls is not None:
        with as_options(limit="--max-calls"):
            budgets.append(Budget(judging.max_calls, "calls", max_per_pair=orders))
    if judging.max_tokens is not None:
        with as_options(limit="--max-tokens"):
            budgets.append(Budget(judging.max_tokens, "tokens"))
    if judging.max_cost is not None:
        with as_options(limit="--max-cost"):
            budgets.append(Budget(judging.max_cost, "cost", first_estimate=orders * _first_call_cost(judging)))
    state = getattr(judging, "router_state", None)
    options = {"calls": "--max-calls", "tokens": "--max-tokens", "cost": "--max-cost"}
    for budget in budgets if state is None or not state.exists() else ():
        least = budget.stats().per_pair
        if budget.limit < least:
            reject(
                options[budget.unit],
                f"{budget.limit:g}",
                f"at least {least:g}, which is set aside for a pair until it is known what pairs cost",
                "Less asks nothing",
            )
    return budgets


def _first_call_cost(judging: Asking) -> float:
    """What a call is taken to cost before one has been bought: a long prompt and a long answer."""
    prices, model = judging.prices, judging.judge_model
    if prices is None:
        reject("--max-cost", "without --prices", "together with it: costs are known from a price table only")
    from rmcore.judge.base import JudgeUsage
    from rmcore.judge.store.prices import PriceTable

    with reading("--prices", prices):
        table = PriceTable.from_file(prices)
    cost = table.cost(JudgeUsage(calls=1, prompt_tokens=3072, completion_tokens=1024), model)
    if cost is None:
        reject("--max-cost", f"no price for {model!r} in {prices}", "a price table that has the judge's model")
    if cost == 0:
        reject(
            "--max-cost", f"a price of 0 for {model!r} in {prices}", "a model that costs something, or no such limit"
        )
    return cost


def _router(judging: Judging, adaptive: AdaptiveRouter | None, prior: ErrorPrior | None = None) -> Router:
    """The router the options name; without any, none is routed."""
    from rmcore.engine.routing import BudgetRouter, LearnedRouter, NeverRoute, ThresholdRouter

    if sum(given is not None for given in (judging.threshold, judging.budget, adaptive)) > 1:
        reject("--threshold, --budget, --judge-fraction", "more than one", "at most one")
    if adaptive is not None:
        return adaptive
    by = _rank_by(judging)
    with as_options(threshold="--threshold", fraction="--budget"):
        if judging.threshold is not None:
            if by == "learned":
                return LearnedRouter(threshold=judging.threshold, prior=prior)
            return ThresholdRouter(judging.threshold, cast("RankBy", by))
        if judging.budget is None:
            return NeverRoute()
        if by == "learned":
            return LearnedRouter(judging.budget, prior=prior)
        return BudgetRouter(fraction=judging.budget, by=cast("RankBy", by))


def make_judge(judging: Asking, *, constitution: Constitution | None = None, rationale: bool = True) -> Judge | None:
    """The judge the options name, or None; it compares in words before its verdict unless ``rationale`` is off."""
    from rmcore.judge import RecordedJudge

    url, verdicts, template = judging.judge_url, judging.verdicts, judging.judge_template
    if url is not None and verdicts is not None:
        reject("--judge-url, --verdicts", "both", "at most one")
    if url is None:
        reject_unused(judging)
    if verdicts is not None:
        with reading("--verdicts", verdicts):
            recorded = RecordedJudge.from_file(verdicts, orders=judging.judge_orders)
        if not len(recorded):
            reject("--verdicts", f"{str(verdicts)!r}, with no row", "recorded verdicts, a row each")
        return recorded
    if not rationale and template is not None:
        reject("--no-rationale, --judge-template", "both", "at most one: a template says itself what is to be written")
    if not rationale and judging.judge_output != "text":
        reject("--no-rationale, --judge-output json_schema", "both", "at most one: the schema has a critique")
    if url is None:
        return None
    if judging.store is None and (judging.reuse != "replies" or judging.ask_again):
        reject("--reuse, --ask-again", "without --store", "together with it")
    _check_ask_again(judging.ask_again or ())
    check_writable(store_file(judging.store), "--store")
    if not judging.judge_model:
        reject("--judge-model", "nothing", "the judge's model name, since --judge-url is given")
    if not judging.judge_model.strip() or not judging.judge_model.isprintable():
        reject("--judge-model", repr(judging.judge_model)[:80], "a model's name, on one line")
    if judging.judge_kind != "genrm" and judging.judge_principle:
        reject("--judge-principle", "without --judge-kind genrm", "together with it")
    with as_options(
        base_url="--judge-url",
        model="--judge-model",
        api_key_env="--judge-key-env",
        concurrency="--judge-concurrency",
        timeout_s="--judge-timeout",
        max_reply_bytes="--judge-max-reply",
        max_tokens="--judge-max-tokens",
        context_tokens="--judge-context",
        requests_per_minute="--judge-requests-per-minute",
        tokens_per_minute="--judge-tokens-per-minute",
        template="--judge-template",
        **{f"template {part}": "--judge-template" for part in ("user", "system")},
    ):
        return _live_judge(judging, url, constitution, rationale)


def _check_ask_again(reasons: Sequence[str]) -> None:
    """Raises InputError for a reason that no reply in a store has: it would ask for nothing again, without a word."""
    from rmcore.judge.question.verdict import UNANSWERED

    unknown = [reason for reason in reasons if reason not in UNANSWERED]
    if unknown:
        remedy = "What failed on its way (timeout, http_500, connection, ...) is not kept, and always asked again"
        reject("--ask-again", ", ".join(map(repr, unknown)), f"one of {', '.join(UNANSWERED)}", remedy)


def _live_judge(judging: Asking, url: str, constitution: Constitution | None, rationale: bool) -> Judge:
    from rmcore.judge import ChatJudge, ClientOptions, GenRMJudge, JudgePrompt, RetryPolicy

    template = judging.judge_template
    shared: dict[str, Any] = {
        "client": ClientOptions(
            concurrency=judging.judge_concurrency,
            timeout_s=judging.judge_timeout,
            retry=RetryPolicy(max_attempts=judging.judge_retries + 1),
            max_reply_bytes=judging.judge_max_reply,
            **_limits(judging, url),
        ),
        "orders": judging.judge_orders,
        "constitution": constitution,
        "max_tokens": judging.judge_max_tokens or None,
        "context_tokens": judging.judge_context,
        "store": _store(judging),
        "prices": make_prices(judging),
    }
    key = judging.judge_key_env or None
    if judging.judge_kind == "genrm":
        soft = judging.judge_soft or judging.judge_min_mass != 0.5
        if template is not None or soft or not rationale or judging.judge_output != "text":
            reject(
                "--judge-kind genrm",
                "with --judge-template, --judge-soft, --judge-min-mass, --judge-output or --no-rationale",
                "none of them: its form is its own",
            )
        return GenRMJudge(url, judging.judge_model, key, principle=judging.judge_principle, **shared)
    prompt = None
    if template is not None:
        with reading("--judge-template", template):
            prompt = JudgePrompt.from_file(template)
    if not rationale:
        from rmcore.judge.question.prompt import VERDICT_ONLY_USER

        prompt = JudgePrompt(user=VERDICT_ONLY_USER)
    return ChatJudge(
        url,
        judging.judge_model,
        key,
        prompt=prompt,
        output=judging.judge_output,
        soft=judging.judge_soft,
        min_mass=judging.judge_min_mass,
        **shared,
    )


def _limits(judging: Asking, url: str) -> dict[str, Any]:
    """Limits of this process, or of all that share the store."""
    from rmcore.judge.store.location import is_url

    rates = {
        "requests_per_minute": judging.judge_requests_per_minute,
        "tokens_per_minute": judging.judge_tokens_per_minute,
    }
    if not is_url(judging.store):
        if judging.run is not None:
            reject("--run", "without a --store in PostgreSQL", "together with one: it counts for all machines")
        return rates
    if judging.run is None and set(rates.values()) == {None}:
        return {}
    from rmcore._base.client.address import Address
    from rmcore.judge.store.shared_limits import SharedLimits

    if judging.run is not None and (judging.max_calls, judging.max_tokens, judging.max_cost) == (None, None, None):
        reject("--run", "without --max-calls, --max-tokens and --max-cost", "together with one of them")
    name = f"{Address.of(url).name} {judging.judge_model}"
    limits = SharedLimits(
        str(judging.store),
        name,
        requests_per_minute=judging.judge_requests_per_minute,
        tokens_per_minute=judging.judge_tokens_per_minute,
        run=judging.run or "",
        max_requests=None if judging.run is None else judging.max_calls,
        max_tokens=None if judging.run is None else judging.max_tokens,
        **_money(judging),
    )
    return {"limits": limits}


def _money(judging: Asking) -> dict[str, Any]:
    """The price of a run's model, wherever there is one: another process of the run may limit the cost."""
    if judging.run is None:
        return {}
    if judging.max_cost is not None:
        _first_call_cost(judging)  # says what is missing
    if judging.prices is None:
        return {}
    from rmcore.judge.store.prices import PriceTable

    with reading("--prices", judging.prices):
        table = PriceTable.from_file(judging.prices)
    price = table.get(judging.judge_model or "")
    return {} if price is None else {"max_cost": judging.max_cost, "price": price, "currency": table.currency}


def _store(judging: Asking) -> VerdictStore | str | None:
    """The store, by its path where nothing is special about it."""
    if judging.store is None or (judging.reuse == "replies" and not judging.ask_again):
        return judging.store
    if judging.reuse == "verdicts" and judging.ask_again:
        reject("--ask-again", "together with --reuse verdicts, which asks all of them again", "one of the two")
    from rmcore.judge import VerdictStore

    return VerdictStore(judging.store, reuse=judging.ask_again or judging.reuse)


def make_prices(judging: Asking) -> PriceTable | None:
    """The price table, if it has the judge's model: found out before calls are bought that it does not price."""
    if judging.prices is None:
        return None
    from rmcore.judge.store.prices import PriceTable

    with reading("--prices", judging.prices):
        table = PriceTable.from_file(judging.prices)
    if judging.judge_model not in table:
        got = f"no price for {judging.judge_model!r} in {judging.prices}"
        reject("--prices", got, f"one; it has {', '.join(sorted(table)) or 'none'}"[:300])
    return table
