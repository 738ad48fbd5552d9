"""The steps of a score call: its micro-batches, one of them through backbone and head, its pairs through the router,
and the end, when the router is told.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from rmcore._base.errors import NonFiniteError, reject
from rmcore._base.prompt import canonical_response, text_length
from rmcore.engine.comparisons import parse_design, swiss_pairs
from rmcore.engine.micro_batches import MicroBatch, micro_batches
from rmcore.engine.pair_table import PairState, PairTable
from rmcore.engine.routing import Candidates, Router, is_budgeted
from rmcore.engine.score_call import ScoreCall
from rmcore.engine.scored_part import Offer, ScoredPart
from rmcore.head.apart import pairs_apart, rows_apart
from rmcore.head.estimators import PairEstimate, PairEstimator, of_kind
from rmcore.head.frozen import PairScores
from rmcore.head.posterior import check_finite
from rmcore.model.critiques import StateCounts
from rmcore.model.error_prior import row_distance
from rmcore.model.signal import PairSignal, fill_unread
from rmcore.model.uncertainties import HEAD, head_estimate, told_apart
from rmcore.ops import reference
from rmcore.ops.pair_layout import PairLayout, PartialLayout

__all__ = ["plan", "route", "score_pairs", "settle"]

log = logging.getLogger(__name__)

# Measured on a CPU, 256 groups of 2, a small Llama: cutting the batch into micro-batches of 1, 2, 4, 8 or 16 forward
# passes took 18, 17, 5, 3 or 0% more processor time than not cutting it; with groups of 4, which share more, nothing.
_LEAST_PASSES = 4
_MOST_MICRO_BATCHES = 12


def plan(call: ScoreCall, *, overlap: bool, tokens: int | None) -> list[MicroBatch]:
    """Cut a call into micro-batches.

    Args:
        call: with its texts encoded, or its hidden rows.
        overlap: whether a judge may answer for one while the next is encoded; if not, there is nothing to cut for.
        tokens: about how many each has; None for the engine's choice.
    """
    if call.groups.hidden is not None or call.model is None:
        return [MicroBatch(0, 0, call.groups.sizes)]
    limit: float = math.inf
    if overlap:
        total = sum(len(text) for group in call.encoded for text in group)
        least = _LEAST_PASSES * call.model.backbone.tokens_per_batch
        limit = tokens or max(least, total / _MOST_MICRO_BATCHES)
    return micro_batches(call.groups.sizes, call.encoded, limit)


def score_pairs(call: ScoreCall, batch: MicroBatch, sketch: Tensor | None = None) -> ScoredPart:
    """A micro-batch's pairs as the head sees them, with their distance from ``sketch`` where a router wants that."""
    (hidden, noise), groups = _hidden_rows(call, batch), list(range(batch.first, batch.stop))
    contain = call.groups.on_error == "return" and call.nonfinite == "raise"
    try:
        if contain:
            hidden, groups = call.groups.without_bad_rows(hidden, groups)
        layout = call.groups.layout_of(groups)
        if call.nonfinite == "raise" and not contain and not layout.all_paired:
            check_finite(hidden)  # the head looks at the pairs, and the row of a group of one is in none
        hidden = hidden.to(call.head.device)
        with call.time("head"):
            own = None if noise is None else torch.cat([noise[k - batch.first] for k in groups])
            keep: Literal["raise", "keep"] = "keep" if contain or call.nonfinite == "route" else "raise"
            table = _table(call, hidden, groups, layout, keep, own)
    except NonFiniteError as error:
        raise _renumbered(error, batch) from None
    if contain:
        hidden, groups, table = call.groups.without_overflows(hidden, groups, table)
    if call.kept is not None:
        call.kept.append(hidden.detach().to("cpu", copy=True))  # the caller may use its tensor again
    return ScoredPart(groups, table, None if sketch is None else _distance(call, hidden, groups, table, sketch))


def _distance(call: ScoreCall, hidden: Tensor, groups: list[int], table: PairTable, sketch: Tensor) -> Tensor:
    """(Q,) float64 on the CPU: the mean of a pair's hidden rows' distances from the nearest of the sketch."""
    with call.time("head"):
        rows = row_distance(hidden, sketch).double().cpu()
        states = call.groups.states_of(groups)
        if states is not None:
            rows = states.mean(rows)
        return rows[table.layout.pair_rows(call.head.config.mode, one_order=call.groups.one_order)].mean(1)


def _columns(call: ScoreCall, part: ScoredPart, rows: Tensor) -> dict[str, Tensor]:
    """What else is known of some pairs of a part: their group, the length of their responses, their distance."""
    layout = part.table.layout
    columns = {"group": layout.group[rows]}
    if call.groups.responses is not None:
        lengths = [
            text_length(canonical_response(response)) for k in part.groups for response in call.groups.responses[k]
        ]
        size = torch.tensor(lengths, dtype=torch.float64).log1p()
        columns["log_length_ratio"] = size[layout.first[rows]] - size[layout.second[rows]]
    if part.distance is not None:
        columns["distance"] = part.distance[rows]
    return columns


def _hidden_rows(call: ScoreCall, batch: MicroBatch) -> tuple[Tensor, list[Tensor] | None]:
    """The hidden rows of a micro-batch, from the caller or the backbone, and the answers' own variance, a group each.

    The latter of a published model of several attributes whose head is asked; else None.
    """
    if call.groups.hidden is not None:
        return call.groups.hidden, None
    assert call.model is not None
    with call.time("backbone"):
        groups = call.encoded[batch.first : batch.stop]
        progress = call.encoding_progress(batch)
        if call.estimator is None and call.model.tells_attributes:
            hidden, said = call.model.hidden_rows_and_attributes(groups, progress=progress, stats=call.encoding)
        else:
            hidden, said = call.model.hidden_rows(groups, progress=progress, stats=call.encoding), None
        hidden = fill_unread(hidden, groups)
        if hidden.is_cuda:
            torch.cuda.current_stream(hidden.device).synchronize()  # or its time would count as the head's
    noise = None if said is None else said.score_variance
    return hidden, None if noise is None else list(noise.split([len(group) for group in groups]))


def _table(
    call: ScoreCall,
    hidden: Tensor,
    groups: list[int],
    layout: PairLayout,
    nonfinite: Literal["raise", "keep"],
    noise: Tensor | None = None,
) -> PairTable:
    head, backend = call.head, call.backend
    apart = call.model is not None and call.model.deterministic == "batch"
    if head.config.mode == "difference":
        score_pairs = partial(pairs_apart, head) if apart else head.score_pairs
        states = call.groups.states_of(groups)
        rows = layout if states is None else PairLayout(states.rows)
        found: PairEstimate | None = None
        if call.estimator is not None:
            pairs, found = _estimated(call, call.estimator, hidden, rows)
        else:
            pairs = score_pairs(
                hidden, rows.sizes, backend=backend, nonfinite=nonfinite, dtype=torch.float64, novelty=call.novelty
            )
        if call.estimator is None and noise is not None:
            found = head_estimate(head, pairs.logit, pairs.variance, rows.sizes, noise)
            if call.variance in ("aleatoric", "total"):
                pairs = _with_columns(of_kind(found, call.variance, "epistemic", HEAD), pairs)
        parts = told_apart(found)
        if states is not None:
            scaled = found is not None and (call.estimator is not None or call.variance in ("aleatoric", "total"))
            pairs, parts = _of_responses(call, pairs, states, layout, parts, scaled=scaled)
        table = PairTable.of_difference(pairs, layout, finite=nonfinite == "raise")
        table.parts = {name: part.to(hidden.device) for name, part in parts.items()}
        measures = {} if found is None else dict(found.measures or {})
        table.measures = {name: of if states is None else states.mean(of) for name, of in measures.items()}
        return table if call.groups.design == "all" else table.narrowed(_compared(call, table))
    score = partial(rows_apart, head) if apart else head.score
    scores = score(hidden, backend=backend, nonfinite=nonfinite)
    return PairTable.of_concat(scores, layout, call.groups.orders, head.config.order_mean)


def _of_responses(
    call: ScoreCall,
    pairs: PairScores,
    states: StateCounts,
    layout: PairLayout,
    parts: dict[str, Tensor],
    *,
    scaled: bool,
) -> tuple[PairScores, dict[str, Tensor]]:
    """Pairs of responses from pairs of their states, one for each critique (:mod:`rmcore.model.critiques`).

    ``scaled`` where variances are in logits, as estimators have them. The parts of the variance have the critiques' own
    beside.
    """
    found = states.pairs(pairs.logit, pairs.variance, parts)
    amplitude = reference.mean_field_amplitude() if scaled else call.head.weights.amplitude
    u = reference.uncertainty(found.variance, amplitude)
    scores = PairScores(found.logit, found.variance, u, reference.preference(found.logit, u))
    if pairs.row_novelty is not None:
        scores.row_novelty = states.mean(pairs.row_novelty.double())
        scores.novelty = reference.pair_novelty(scores.row_novelty, layout.first, layout.second)
    return scores, {**found.parts, "critique_variance": found.between} if found.parts else {}


def _estimated(
    call: ScoreCall, estimator: PairEstimator, hidden: Tensor, layout: PairLayout
) -> tuple[PairScores, PairEstimate]:
    """An estimator's pairs, on the head's device; novelty is the head's all the same."""
    found = estimator.pairs(hidden.cpu(), layout.sizes)
    if call.variance is not None:
        found = of_kind(found, call.variance, estimator.kind, estimator.name)
    scores = _with_columns(found, device=hidden.device)
    if call.novelty:
        scores.row_novelty = call.head.novelty(hidden, backend=call.backend).double()
        scores.novelty = reference.pair_novelty(scores.row_novelty, layout.first, layout.second)
    return scores, found


def _with_columns(
    found: PairEstimate, novelty_of: PairScores | None = None, device: torch.device | None = None
) -> PairScores:
    """An estimate as the four columns that a table wants, with another's novelty."""
    u = reference.uncertainty(found.variance, reference.mean_field_amplitude())
    columns = (found.logit, found.variance, u, found.preference)
    scores = PairScores(*(column if device is None else column.to(device) for column in columns))
    if novelty_of is not None:
        scores.novelty, scores.row_novelty = novelty_of.novelty, novelty_of.row_novelty
    return scores


def _compared(call: ScoreCall, table: PairTable) -> PartialLayout:
    """Which pairs of a difference-mode table the design compares."""
    sizes, (name, rounds) = table.layout.sizes.tolist(), parse_design(call.groups.design)
    if name != "swiss":
        return PartialLayout(sizes, [call.groups.design_of(size) for size in sizes])
    standing = table.advantages().split(sizes)
    return PartialLayout(sizes, [swiss_pairs(own, rounds) for own in standing])


def _renumbered(error: NonFiniteError, part: MicroBatch) -> NonFiniteError:
    """The error with its rows counted from the first of the whole call, as the caller counts them."""
    if part.first_row == 0:
        return error
    where = f"rows counted within groups {part.first} to {part.stop - 1}, whose first is row {part.first_row} of all"
    return NonFiniteError(f"{error} ({where})", tuple(part.first_row + row for row in error.rows))


def route(call: ScoreCall, part: ScoredPart, router: Router, *, may_ask: bool) -> None:
    """Decide equal responses by rule, let the router choose among the rest, and hand those over to the judge."""
    table = part.table
    if call.groups.responses is not None:
        table.decide_identical(call.groups.responses[group] for group in part.groups)
    call.find_silent(part)
    if not may_ask:
        if table.silent:
            table.state[(table.signal != PairSignal.PRESENT) & (table.state == PairState.HEAD)] = PairState.NOBODY
        return
    rows = table.undecided()
    silent = table.signal[rows] != PairSignal.PRESENT
    novelty = table.novelty
    values = table.values if novelty is None else torch.cat([table.values, novelty[None]])  # one transfer
    logit, variance, uncertainty, preference, *more = values.cpu()[:, rows]
    # First in line by every score: no margin, and nothing known.
    logit, variance = logit.masked_fill(silent, 0.0), variance.masked_fill(silent, math.inf)
    columns = _columns(call, part, rows)
    if more:
        columns["novelty"] = more[0].masked_fill(uncertainty.isinf(), math.inf)
    candidates = Candidates(logit, variance, uncertainty, columns)
    usable = uncertainty.isfinite() | silent  # always, unless nonfinite="route"
    if is_budgeted(router):
        chosen, part.reservation = router.reserve(candidates)
        _check_choice("router.reserve", chosen, len(candidates))
        part.offer = Offer(candidates, rows, chosen)
        table.state[rows[~usable & ~chosen]] = PairState.UNAFFORDABLE
    else:
        chosen = ~usable
        if bool(usable.any()):
            offered = candidates[usable]
            picked = router.select(offered)
            _check_choice("router.select", picked, len(offered))
            chosen[usable] = picked
            part.offer = Offer(offered, rows[usable], picked)
    table.state[rows[silent & ~chosen]] = PairState.NOBODY
    call.submit(part, rows[chosen], preference[chosen], uncertainty[chosen])


def _check_choice(what: str, chosen: object, count: int) -> None:
    if not isinstance(chosen, Tensor) or chosen.shape != (count,) or chosen.dtype != torch.bool:
        got = f"{tuple(chosen.shape)} {chosen.dtype}" if isinstance(chosen, Tensor) else type(chosen).__name__
        reject(what, got, f"a ({count},) bool tensor")


def settle(call: ScoreCall, router: Router) -> None:
    """Tell the router what became of its choices and of each reservation: exactly once, whatever has happened.

    Only when the call has ended and in this order, so that what the router chooses within a call never depends on the
    judge's timing.
    """
    observe = getattr(router, "observe", None)
    for part in call.parts:
        try:
            if part.reservation is not None:
                assert is_budgeted(router)
                router.settle(part.reservation, part.usage)
        except Exception:  # the verdicts are paid for and in; a router's books must not lose them
            log.exception("router.settle raised; its books may be wrong from here on")
        try:
            if part.offer is not None and observe is not None:
                offer = part.offer
                observe(offer.candidates, offer.routed, offer.preference(part.table.verdicts))
        except Exception:  # nor must what it learns
            log.exception("router.observe raised; it has not learned from these verdicts")
