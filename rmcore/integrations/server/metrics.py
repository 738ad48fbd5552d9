"""What a server tells Prometheus: histograms, and the counts that its parts keep anyway, read when somebody asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from rmcore._base.version import __version__
from rmcore.integrations.server.assembly import GroupAssembly
from rmcore.integrations.server.batching import BatchScorer
from rmcore.integrations.server.guard import Guard
from rmcore.integrations.server.peers import Peers
from rmcore.integrations.server.replies import ReplyStore

__all__ = ["CountedService", "ServerMetrics"]

_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 120)
_LATENCIES_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 180)


class CountedService(Protocol):
    """The parts of a :class:`~rmcore.integrations.server.service.RewardService` that count."""

    scorer: BatchScorer
    assembly: GroupAssembly
    replies: ReplyStore
    guard: Guard | None
    peers: Peers
    draining: bool
    model: str


class ServerMetrics(Collector):
    """The metrics of one server, in a registry of its own: two servers in a process do not mix.

    Args:
        service: whose counts are read when somebody scrapes.

    Attributes:
        registry: all of them, for whoever wants to add to it or push it.
        batch_groups: groups in a batch.
        wait_seconds: from a group's arrival to its batch.
        batch_seconds: scoring of a batch, the judge included.
        request_seconds: time to answer, by ``path``.
    """

    def __init__(self, service: CountedService) -> None:
        self._service = service
        self.registry = CollectorRegistry()

        def histogram(name: str, help: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
            return Histogram(name, help, labels, buckets=buckets, registry=self.registry)

        self.batch_groups = histogram("rmcore_batch_groups", "Groups in a batch.", _BATCH_SIZES)
        self.wait_seconds = histogram("rmcore_group_wait_seconds", "From a group's arrival to its batch.", _SECONDS)
        self.batch_seconds = histogram("rmcore_batch_seconds", "Scoring of a batch, the judge included.", _SECONDS)
        self.request_seconds = histogram("rmcore_http_request_seconds", "Time to answer.", _LATENCIES_S, ("path",))
        self.registry.register(self)

    def page(self, accept: str = "") -> tuple[bytes, str]:
        """The page and its Content-Type: text format 0.0.4, or what the ``Accept`` header asks for (OpenMetrics)."""
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # of a version that is no number; RFC 9110 lets a server ignore such a header
            encode, content_type = choose_encoder("")
        return encode(self.registry), content_type

    def collect(self) -> Iterator[Metric]:
        """The counts and gauges as they are now."""
        service = self._service
        yield _gauge("rmcore_ready", "1 unless the server is going down.", float(not service.draining))
        yield from _identity(service)
        yield from _requests(service)
        yield from _batches(service)
        yield from _assembly(service)
        yield from _judge(service)
        yield from _stream(service)


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help, value=value)


def _counter(name: str, help: str, value: float) -> Metric:
    return CounterMetricFamily(name, help, value=value)


def _counters(name: str, help: str, label: str, values: Mapping[str, float]) -> Metric:
    """One counter for each value of ``label``."""
    family = CounterMetricFamily(name, help, labels=(label,))
    for of, value in values.items():
        family.add_metric((of,), value)
    return family


def _requests(service: CountedService) -> Iterator[Metric]:
    guard = service.guard
    if guard is None:
        return
    answered = CounterMetricFamily("rmcore_http_requests", "Answered requests.", labels=("path", "status"))
    for path_and_status, count in sorted(guard.requests.items()):
        answered.add_metric(path_and_status, count)
    yield answered
    yield _gauge("rmcore_http_requests_active", "Requests under way.", guard.active)
    yield _counter("rmcore_replayed_answers", "Retries answered from memory.", service.replies.replayed)


def _batches(service: CountedService) -> Iterator[Metric]:
    scorer, stats = service.scorer, service.scorer.stats
    yield _gauge("rmcore_queue_groups", "Groups waiting for a batch.", scorer.queued)
    yield _gauge("rmcore_batches_in_flight", "Batches under way.", scorer.in_flight)
    yield _counter("rmcore_batches", "Scored batches.", stats.batches)
    outcomes = {
        "scored": stats.groups,
        "failed": stats.failed_groups,
        "withdrawn": stats.withdrawn_groups,
        "refused": stats.refused_groups,
    }
    yield _counters("rmcore_groups", "Groups by outcome.", "outcome", outcomes)
    yield _counter("rmcore_responses", "Scored responses.", stats.responses)
    yield _counter("rmcore_unscorable_responses", "Those without a preference.", stats.unscorable_responses)
    engine: Any = scorer.engine
    if hasattr(engine, "asked_again"):  # whose batches go to other processes
        calls = {"lost": engine.deaths, "asked_again": engine.asked_again}
        yield _counters("rmcore_replica_calls", "Batches whose replica died or is slow.", "outcome", calls)
    pairs = {by: stats.pairs[by] for by in ("head", "judge", "judge_failed", "identical", "nobody")}
    yield _counters("rmcore_pairs", "Pairs by who decided them.", "by", pairs)


def _assembly(service: CountedService) -> Iterator[Metric]:
    assembly, stats = service.assembly, service.assembly.stats
    yield _gauge("rmcore_members_waiting", "Members waiting for their groups.", assembly.waiting)
    yield _gauge("rmcore_open_groups", "Groups that are not whole yet.", assembly.open_groups)
    outcomes = {
        "joined": stats.members,
        "retried": stats.retries,
        "recovered": stats.recovered,
        "abandoned": stats.abandoned,
        "late": stats.late_members,
        "refused": stats.refused,
    }
    yield _counters("rmcore_members", "Members by what became of their calls.", "outcome", outcomes)
    groups = {
        "whole": stats.groups - stats.partial_groups,
        "partial": stats.partial_groups,
        "failed": stats.failed_groups,
    }
    yield _counters("rmcore_assembled_groups", "Groups put together from members.", "outcome", groups)
    peers = {
        outcome: service.peers.members[outcome] for outcome in ("passed_on", "taken_over", "unreachable", "refused")
    }
    yield _counters("rmcore_peer_members", "Members that another server has to do with.", "outcome", peers)


def _judge(service: CountedService) -> Iterator[Metric]:
    stats, usage = service.scorer.stats, service.scorer.stats.usage
    yield _counter("rmcore_judge_calls", "Questions put to the judge.", usage.calls)
    yield _counter("rmcore_judge_attempts", "HTTP requests they took.", usage.attempts)
    yield _counter("rmcore_judge_cache_hits", "Questions answered without a call.", usage.cache_hits)
    yield _counter("rmcore_judge_seconds", "Time of all calls together.", usage.seconds)
    yield _counter("rmcore_judge_flips", "Verdicts that changed with the order.", stats.flips)
    tokens = {
        "prompt": usage.prompt_tokens,
        "cached": usage.cached_tokens,
        "completion": usage.completion_tokens,
        "reasoning": usage.reasoning_tokens,
    }
    yield _counters("rmcore_judge_tokens", "Tokens by kind.", "kind", tokens)
    yield _counter("rmcore_judge_cost", "Cost of the calls that have a price.", usage.cost)
    yield _counter("rmcore_judge_unpriced_calls", "Calls that have none.", usage.unpriced_calls)
    unknown = stats.unaccounted_questions
    yield _counter("rmcore_judge_unaccounted_questions", "Questions of unknown cost.", unknown)


def _identity(service: CountedService) -> Iterator[Metric]:
    """Which rmcore, which model, and which version of a head that learns."""
    info = GaugeMetricFamily("rmcore_build_info", "1; what serves.", labels=("version", "model"))
    info.add_metric((__version__, service.model), 1.0)
    yield info
    version = getattr(service.scorer.engine, "head_version", None)  # an engine of one's own may have none
    yield _gauge("rmcore_head_version", "Of a head that learns; 0 of one that does not.", version or 0)


def _stream(service: CountedService) -> Iterator[Metric]:
    """What a policy that outgrows its reward model shows first."""
    stats = service.scorer.stats
    stream, pairs = stats.stream, stats.pairs
    routed = pairs["judge"] + pairs["judge_failed"]
    yield _counter("rmcore_routed_pairs", "Pairs that were to be judged.", routed)
    yield HistogramMetricFamily(
        "rmcore_pair_uncertainty", "u of each pair.", buckets=stream.buckets(), sum_value=stream.total
    )
    recent = GaugeMetricFamily("rmcore_recent_uncertainty", "Quantiles of the latest 4,096.", labels=("quantile",))
    for level, value in stream.recent_quantiles().items():
        recent.add_metric((level,), value)
    yield recent
    seen = stream.agreement
    yield _counter("rmcore_judged_weight", "Verdicts with a side, by their strength.", seen.judged)
    yield _counter("rmcore_judge_disagreement", "Of those, where the head has the other side.", seen.disagreed)
    expected = "What a calibrated head and a judge without errors would give."
    yield _counter("rmcore_judge_disagreement_expected", expected, seen.expected)
