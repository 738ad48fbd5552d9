"""The field's benchmarks, a module each: how rows are read, which pairs count, how credit becomes a score.

None of their rows come with rmcore: they are read from the hub or from files. What a benchmark is made of is in
``item``, the readers in ``reading``, a model's answers in ``scoring``, what comes out in ``report``.
"""

from __future__ import annotations

from rmcore._base.errors import reject
from rmcore.evaluation.benchmarks import judgebench, ppe, rewardbench, rewardbench2, rm_bench, rmb
from rmcore.evaluation.benchmarks.item import Benchmark

__all__ = ["BENCHMARKS", "find_benchmark"]

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        rewardbench.BENCHMARK,
        rewardbench2.BENCHMARK,
        rm_bench.BENCHMARK,
        judgebench.BENCHMARK,
        ppe.PAIRS,
        ppe.BEST_OF_K,
        rmb.BENCHMARK,
    )
}


def find_benchmark(name: str) -> Benchmark:
    """A benchmark by its name, in any case, with or without hyphens; raises InputError with the names there are."""
    plain = {_plain(known): benchmark for known, benchmark in BENCHMARKS.items()}
    if _plain(name) not in plain:
        reject("benchmark", repr(name)[:60], f"one of {', '.join(BENCHMARKS)}")
    return plain[_plain(name)]


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
