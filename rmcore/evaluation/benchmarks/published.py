"""Figures that papers print of these benchmarks: theirs, shown beside ours and marked so. Nothing here was measured.

Only what is known from the source named stands here. Of the routing tables that is how many pairs were judged; the
accuracies at these points are not here.
"""

from __future__ import annotations

from dataclasses import dataclass

from rmcore._base.errors import reject

__all__ = ["PUBLISHED", "ROUTED", "Published", "published_budgets", "published_note"]

_ROUTER = "“Ask a Strong LLM Judge when Your Reward Model is Uncertain”, NeurIPS 2025, arXiv:2510.20369"


@dataclass(frozen=True)
class Published:
    """A score as a paper states it, in percent."""

    what: str
    score: float
    source: str


PUBLISHED: dict[str, tuple[Published, ...]] = {
    "rewardbench": (Published("URM, score", 92.9, "arXiv:2410.00847"),),
}
"""Benchmark → what papers say that models score on it."""

ROUTED: dict[str, tuple[int, tuple[int, ...], str]] = {
    "rewardbench": (2985, (58, 274, 719, 1270), _ROUTER),
    "rm-bench": (1327 * 9, (242, 1285, 3188, 5270), _ROUTER),
}
"""Benchmark → its pairs, how many of them the paper's router put to the judge at its four thresholds, and the paper."""


def published_budgets(benchmark: str) -> tuple[float, ...]:
    """The shares of pairs judged in the published routing table; raises InputError where there is none."""
    if benchmark not in ROUTED:
        reject("--budgets", f"'published' for {benchmark}", f"one of {', '.join(ROUTED)}")
    pairs, calls, _ = ROUTED[benchmark]
    return tuple(count / pairs for count in calls)


def published_note(benchmark: str, pairs: int) -> str:
    """Markdown on what papers print of a benchmark; empty where nothing is known."""
    lines = [
        f"| {one.what} | {one.score:.1f} | published, not measured here: {one.source} |"
        for one in PUBLISHED.get(benchmark, ())
    ]
    if benchmark in ROUTED:
        whole, calls, source = ROUTED[benchmark]
        told = ", ".join(f"{count} ({100 * count / whole:.1f}%)" for count in calls)
        what = f"pairs judged by the paper's router, of {whole}"
        lines.append(f"| {what} | {told} | published, not measured here: {source} |")
        if pairs != whole:
            lines.append(f"| pairs here | {pairs} | not the same rows: the lines above do not compare with ours |")
    return "\n".join(["| published | | source |", "|---|---:|---|", *lines]) + "\n" if lines else ""
