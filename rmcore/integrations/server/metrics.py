"""What a server tells Prometheus: counts that its parts keep anyway, read when somebody asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rmcore.integrations.server.prometheus import Family, Histogram

if TYPE_CHECKING:
    from rmcore.integrations.server.service import RewardService

__all__ = ["figures"]


def figures(service: RewardService) -> Iterator[Family | Histogram]:
    """All families of the page."""
    yield Family.of("rmcore_ready", "gauge", "1 unless the server is going down.", float(not service.draining))
    yield from _requests(service)
    yield from _batches(service)
    yield from _assembly(service)
    yield from _judge(service)


def _requests(service: RewardService) -> Iterator[Family | Histogram]:
    guard = service.guard
    if guard is None:
        return
    counts = [({"path": path, "status": status}, float(n)) for (path, status), n in sorted(guard.requests.items())]
    yield Family("rmcore_http_requests", "counter", "Answered requests.", counts)
    yield Family.of("rmcore_http_requests_active", "gauge", "Requests under way.", guard.active)
    yield guard.latency
    yield Family.of("rmcore_replayed_answers", "counter", "Retries answered from memory.", service.replies.replayed)


def _batches(service: RewardService) -> Iterator[Family | Histogram]:
    scorer, stats = service.scorer, service.scorer.stats
    yield Family.of("rmcore_queue_groups", "gauge", "Groups waiting for a batch.", scorer.queued)
    yield Family.of("rmcore_batches_in_flight", "gauge", "Batches under way.", scorer.in_flight)
    yield Family.of("rmcore_batches", "counter", "Scored batches.", stats.batches)
    yield Family.of(
        "rmcore_split_batches", "counter", "Batches split to find what cannot be scored.", stats.split_batches
    )
    outcomes = {
        "scored": stats.groups,
        "failed": stats.failed_groups,
        "withdrawn": stats.withdrawn_groups,
        "refused": stats.refused_groups,
    }
    yield Family("rmcore_groups", "counter", "Groups by outcome.", [({"outcome": k}, v) for k, v in outcomes.items()])
    yield Family.of("rmcore_responses", "counter", "Scored responses.", stats.responses)
    yield Family.of("rmcore_unscorable_responses", "counter", "Those without a preference.", stats.unscorable_responses)
    pairs = [({"by": by}, float(stats.pairs[by])) for by in ("head", "judge", "judge_failed", "identical")]
    yield Family("rmcore_pairs", "counter", "Pairs by who decided them.", pairs)
    yield service.batch_sizes
    yield service.waits
    yield service.scorings


def _assembly(service: RewardService) -> Iterator[Family]:
    assembly, stats = service.assembly, service.assembly.stats
    yield Family.of("rmcore_members_waiting", "gauge", "Members waiting for their groups.", assembly.waiting)
    yield Family.of("rmcore_open_groups", "gauge", "Groups that are not whole yet.", assembly.open_groups)
    outcomes = {
        "joined": stats.members,
        "retried": stats.retries,
        "recovered": stats.recovered,
        "abandoned": stats.abandoned,
        "late": stats.late_members,
        "refused": stats.refused,
    }
    samples = [({"outcome": name}, value) for name, value in outcomes.items()]
    yield Family("rmcore_members", "counter", "Members by what became of their calls.", samples)
    groups = {
        "whole": stats.groups - stats.partial_groups,
        "partial": stats.partial_groups,
        "failed": stats.failed_groups,
    }
    samples = [({"outcome": name}, value) for name, value in groups.items()]
    yield Family("rmcore_assembled_groups", "counter", "Groups put together from members.", samples)


def _judge(service: RewardService) -> Iterator[Family]:
    stats, usage = service.scorer.stats, service.scorer.stats.usage
    yield Family.of("rmcore_judge_calls", "counter", "Questions put to the judge.", usage.calls)
    yield Family.of("rmcore_judge_attempts", "counter", "HTTP requests they took.", usage.attempts)
    yield Family.of("rmcore_judge_cache_hits", "counter", "Questions answered without a call.", usage.cache_hits)
    yield Family.of("rmcore_judge_seconds", "counter", "Time of all calls together.", usage.seconds)
    yield Family.of("rmcore_judge_flips", "counter", "Verdicts that changed with the order.", stats.flips)
    tokens = {
        "prompt": usage.prompt_tokens,
        "cached": usage.cached_tokens,
        "completion": usage.completion_tokens,
        "reasoning": usage.reasoning_tokens,
    }
    yield Family("rmcore_judge_tokens", "counter", "Tokens by kind.", [({"kind": k}, v) for k, v in tokens.items()])
    yield Family.of("rmcore_judge_cost", "counter", "Cost of the calls that have a price.", usage.cost)
    yield Family.of("rmcore_judge_unpriced_calls", "counter", "Calls that have none.", usage.unpriced_calls)
    unknown = stats.unaccounted_questions
    yield Family.of("rmcore_judge_unaccounted_questions", "counter", "Questions of unknown cost.", unknown)
