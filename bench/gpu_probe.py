"""One step of ``make gpu-check``, in a process of its own: each fact is a JSON line, on disk before the next is sought.

    python bench/gpu_probe.py STEP [--device cpu --size 256 --rows 1 16]     (on a CPU only to try the script itself)

A case that raises becomes a row with ``failed``, and the next one goes on; after an error that poisons the CUDA context
the process ends with exit code 3, since nothing measured after it can be believed. SIGINT ends it with what it has.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rmcore import ops
from rmcore._base.arguments import real, whole
from rmcore.bench import eager as eager_suite
from rmcore.bench import harness, peers
from rmcore.bench.attributes import attribute_heads
from rmcore.bench.gpu_facts import Probe, repeats, timed_facts
from rmcore.bench.rows import head_bytes, head_flop
from rmcore.ops import whole_numbers
from rmcore.ops.backends import cuda, cuda_mid, triton_tma
from rmcore.ops.sources import CUDA_ALONE, LAUNCHED, kernel_of, sources

ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
PEERS = ("torch eager, dense fp32", "torch eager, folded bf16", "torch.compile, folded bf16")


# -- the steps -------------------------------------------------------------------------------------------------------


def environment(probe: Probe) -> None:
    """Card, versions, date, commit."""
    digests = {name: {op: sources(name, op) for op in (*LAUNCHED, *CUDA_ALONE)} for name in ("cuda", "triton")}
    probe.attempt("environment", lambda: harness.environment(probe.device) | {"sources": digests})


def limits(probe: Probe) -> None:
    """What the card can do: copy, read, matrix products. The floors of every other row rest on these."""

    def read() -> dict[str, Any]:
        data = torch.randn(1 << (28 if probe.device.type == "cuda" else 22), device=probe.device)
        return {"read_GBs": 4e-9 * data.numel() / harness.time_calls([data.sum], probe.device, budget_s=0.2).low}

    probe.attempt("read", read)
    quick = probe.device.type == "cpu"
    probe.attempt("limits", lambda: harness.as_dict(harness.measure_limits(probe.device, quick=quick)))


def smoke(probe: Probe) -> None:
    """Right, wrong, hanging or racy: numbers against float64 truth and bits over repeats, before anything is timed."""
    _score(probe, probe.rows or (1, 9, 17, 64, 256, 1024), timed=False)


def smoke_mid(probe: Probe) -> None:
    """The same of the persistent launch for 65 to 512 rows, which nothing else here runs; every row is compared."""
    problem = probe.problem()
    with cuda.mid():
        copies = [peers.ours(problem)]
        for rows in probe.rows or (65, 130, 256, 300, 512):
            case = partial(_score_once, probe, problem, copies, probe.hidden(rows), "cuda", False, rows)
            probe.attempt("score_mid cuda", case, rows=rows)
            prepared: Any = copies[0].cache.get("cuda_mid")
            layout = prepared and prepared.plans.get((probe.device.index or 0, rows))
            if layout:
                names = ("columns", "groups", "clusters", "slots", "shared_bytes")
                probe.write("plan of score_mid", rows=rows, **{name: getattr(layout, name) for name in names})


def score(probe: Probe) -> None:
    """The headline table: every backend at every batch size."""
    _score(probe, probe.rows or ROWS, timed=True)


def _score(probe: Probe, sizes: tuple[int, ...], *, timed: bool) -> None:
    problem = probe.problem()
    weights = peers.ours(problem)
    count = harness.rotations(weights.nbytes(), probe.device) if timed else 1
    copies = [weights, *(weights.clone() for _ in range(count - 1))]
    for rows in sizes:
        hidden = probe.hidden(rows)
        for backend in probe.runnable("score", rows, weights):
            probe.attempt(
                f"{kernel_of('score', probe.dtype)} {backend}",
                partial(_score_once, probe, problem, copies, hidden, backend, timed),
                rows=rows,
                copies=count,
            )


def _score_once(
    probe: Probe,
    problem: peers.Problem,
    copies: list[Any],
    hidden: Tensor,
    backend: Any,
    timed: bool,
    compared: int = 64,
) -> dict[str, Any]:
    rows, device, n = len(hidden), probe.device, probe.size
    out = torch.full((4, rows), float("nan"), device=device)
    scores = ops.score(hidden, copies[0], backend=backend, out=out)
    logit, variance = _truth(probe, problem, copies[0], hidden[:compared])
    facts: dict[str, Any] = {
        "err_g": harness.relative_error(scores.logit[:compared], logit),
        "err_v": harness.relative_error(scores.variance[:compared], variance),
        "finite": bool(out.isfinite().all()),
    }
    first, same = out.clone(), True
    for _ in range(probe.repeats):  # a bit that moves is a race
        out.fill_(float("nan"))
        ops.score(hidden, copies[0], backend=backend, out=out)
        same &= torch.equal(out, first)
    if probe.repeats:  # of none, as under a profiler, nobody knows
        facts["bits_repeat"] = same
    if timed:
        spare = torch.empty(4, rows, device=device)
        calls = [partial(ops.score, hidden, copy, backend=backend, out=spare) for copy in copies]
        timing = harness.time_calls(calls, device, budget_s=probe.budget_s)
        facts |= timed_facts(timing)
        facts["GBs"] = head_bytes(rows, n, n, probe.dtype.itemsize) / timing.median / 1e9
        facts["TFLOPs"] = head_flop(rows, n, n) / timing.median / 1e12
        began = time.perf_counter()
        for call in calls * (50 // len(calls) + 1):
            call()
        facts["eager_host_us"] = 1e6 * (time.perf_counter() - began) / (len(calls) * (50 // len(calls) + 1))
        harness.synchronize(device)
    return facts


def _truth(probe: Probe, problem: peers.Problem, weights: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(g, v) in float64; of int8 heads from the same whole numbers, since theirs is what a kernel must find."""
    if probe.dtype != torch.int8:
        return peers.truth(problem, hidden)
    logit, variance, _, _ = whole_numbers.score(hidden, weights)
    return logit, variance


def versus(probe: Probe) -> None:
    """The same head in plain torch, eager and compiled, in the same run."""
    problem = probe.problem()
    for peer in peers.PEERS:
        if peer.name not in PEERS:
            continue
        kept = peer.weights(problem)
        copies = [kept, *(tuple(t.clone() for t in kept) for _ in range(2))]
        function = torch.compile(peer.run, dynamic=True) if peer.compiled else peer.run
        for rows in probe.rows or (1, 64, 256, 1024, 4096):
            hidden = probe.hidden(rows)

            def measure(function: Any = function, copies: Any = copies, hidden: Tensor = hidden) -> dict[str, Any]:
                calls = [partial(function, hidden, *copy) for copy in copies]
                return timed_facts(harness.time_calls(calls, probe.device, budget_s=probe.budget_s))

            probe.attempt(f"peer {peer.name}", measure, rows=rows)


def other(probe: Probe) -> None:
    """accumulate, power iteration and pair variance: right, and how fast."""
    problem = probe.problem()
    weights = peers.ours(problem)
    for backend in probe.runnable("accumulate"):
        probe.attempt(f"accumulate {backend}", partial(_accumulate, probe, problem, backend))
    for backend in probe.runnable("power_iteration"):
        for dtype in (torch.float16, torch.float32):
            probe.attempt(f"power_iteration {backend} {dtype}", partial(_power, probe, backend, dtype))
    heads = attribute_heads(min(probe.size, 4096), 1, probe.dtype).to(probe.device)
    for rows in (1, 64, 1024) if probe.device.type == "cuda" else (1, 4):
        for backend in probe.runnable("score_attributes", rows, heads):
            probe.attempt(f"score_attributes {backend}", partial(_attributes, probe, heads, backend, rows), rows=rows)
    for backend in probe.runnable("pair_variance"):
        for k in (4, 8):
            probe.attempt(f"pair_variance {backend}", partial(_pairs, probe, weights, backend, k), groups=64, k=k)


def _accumulate(probe: Probe, problem: peers.Problem, backend: Any, count: int = 0) -> dict[str, Any]:
    n, device, feature_map = probe.size, probe.device, problem.feature_map
    count = count or (min(65536, 16 * n) if device.type == "cuda" else 512)
    hidden = torch.randn(count, n, device=device, dtype=probe.dtype)
    labels, beta = torch.ones(count, device=device), torch.zeros(n, device=device)
    precision, gradient = torch.zeros(n, n, device=device), torch.zeros(n, device=device)
    add = partial(
        ops.accumulate, hidden, labels, feature_map, beta, precision=precision, gradient=gradient, backend=backend
    )
    add()
    parts = ((feature_map(part.float()) * feature_map.feature_scale).double() for part in hidden.split(4096))
    want = torch.stack([part.square().sum(0) for part in parts]).sum(0) / 4  # p = 1/2 at β = 0: w = 1/4
    facts = {"rows": count, "err_diagonal": harness.relative_error(precision.diagonal(), want)}
    few, some = hidden[:4096], labels[:4096]

    def bits() -> tuple[Tensor, ...]:
        p, slope = torch.zeros(n, n, device=device), torch.zeros(n, device=device)
        total = ops.accumulate(few, some, feature_map, beta, precision=p, gradient=slope, backend=backend)
        return p.tril_(), slope, total

    facts["bits_repeat"] = repeats(probe, bits)
    timing = harness.time_calls([add], device, budget_s=probe.budget_s, min_samples=3)
    return facts | timed_facts(timing) | {"TFLOPs": 3.0 * count * n * n / timing.median / 1e12}


def _power(probe: Probe, backend: Any, dtype: torch.dtype) -> dict[str, Any]:
    n, device = probe.size, probe.device
    matrix, vector = torch.randn(n, n, device=device).to(dtype), torch.randn(n, device=device)
    count = harness.rotations(matrix.numel() * matrix.element_size(), device)
    copies = [matrix, *(matrix.clone() for _ in range(count - 1))]
    sigma, _ = ops.power_iteration(matrix, vector, 1, backend=backend)
    unit = vector.double() / vector.double().norm()
    facts = {"err": harness.relative_error(sigma, (matrix.double() @ unit).norm()), "copies": count}
    facts["bits_repeat"] = repeats(probe, partial(ops.power_iteration, matrix, vector, 2, backend=backend))
    calls = [partial(ops.power_iteration, copy, vector, 1, backend=backend) for copy in copies]  # cold
    timing = harness.time_calls(calls, device, budget_s=probe.budget_s)
    # Of twenty steps all but the first find what fits in the L2 there, as they do in use.
    twenty = harness.time_calls(
        [partial(ops.power_iteration, matrix, vector, 20, backend=backend)], device, budget_s=probe.budget_s
    )
    return facts | timed_facts(timing) | {"us_per_iteration_of_20_warm": 1e6 * twenty.median / 20}


def _attributes(probe: Probe, heads: Any, backend: Any, rows: int) -> dict[str, Any]:
    hidden = torch.randn(rows, heads.hidden_size, device=probe.device, dtype=probe.dtype)
    found = ops.score_attributes(hidden, heads, backend=backend)
    want = ops.score_attributes(hidden[:64].double(), heads, backend="torch")
    facts = {
        "err_g": harness.relative_error(found.mean[:64], want.mean),
        "err_v": harness.relative_error(found.variance[:64], want.variance),
        "finite": bool(found.mean.isfinite().all() and found.variance.isfinite().all()),
        "bits_repeat": repeats(probe, lambda: ops.score_attributes(hidden, heads, backend=backend)[:4]),
    }
    copies = [heads, *(heads.clone() for _ in range(harness.rotations(heads.nbytes(), probe.device) - 1))]
    calls = [partial(ops.score_attributes, hidden, copy, backend=backend) for copy in copies]
    timing = harness.time_calls(calls, probe.device, budget_s=probe.budget_s)
    return facts | timed_facts(timing) | {"GBs": heads.nbytes() / timing.median / 1e9, "copies": len(copies)}


def _pairs(probe: Probe, weights: Any, backend: Any, k: int) -> dict[str, Any]:
    hidden = probe.hidden(64 * k)
    sizes = torch.full((64,), k, dtype=torch.int64)
    logit, variance = ops.pair_variance(hidden, sizes, weights, backend=backend)
    want_g, want_v = ops.pair_variance(hidden.double(), sizes, weights, backend="torch")
    facts = {"err_g": harness.relative_error(logit, want_g), "err_v": harness.relative_error(variance, want_v)}
    call = partial(ops.pair_variance, hidden, sizes, weights, backend=backend)
    facts["bits_repeat"] = repeats(probe, call)
    return facts | timed_facts(harness.time_calls([call], probe.device, budget_s=probe.budget_s))


def eager(probe: Probe) -> None:
    """The host's time before a score's kernels start, on the long way and on the planned one."""
    for backend in probe.backends:

        def measure(name: Any = backend) -> dict[str, Any]:
            for row in eager_suite.measure(name, probe.device, min(probe.size, 1024), print):
                probe.write(f"eager {name}, {row.pop('way')}", **row)
            for row in eager_suite.operations(probe.device, min(probe.size, 1024)) if name == "triton" else ():
                probe.write(f"eager {name} {row.pop('op')}, {row.pop('way')}", **row)
            return {"done": True}

        probe.attempt(f"eager {backend}", measure)


FORM_ROWS = {
    "streamed": (1, 4, 8, 16),
    "mid": (65, 96, 128, 192, 256, 384, 512),
    "tail": (1, 16, 32, 64, 128, 256, 1024, 4096),
    "launch": (1, 64, 256, 1024),
    "large": (512, 1024, 4096, 16384),
}


def forms(probe: Probe) -> None:
    """Ways to do one thing, side by side on the same inputs: ``heuristics.FORMS`` takes the fastest.

    ``streamed`` is the cuda backend's: small batches by the streamed kernel or by the one for every head. ``mid`` holds
    its launch for 65 to 512 rows beside triton.
    """
    from rmcore.kernels import heuristics

    problem = probe.problem()
    for name in probe.forms:
        if name == "streamed":
            for cuda.STREAMED in (False, True):
                copies = _copies(probe, problem)
                for rows in probe.rows or FORM_ROWS[name]:
                    case = partial(_score_once, probe, problem, copies, probe.hidden(rows), "cuda", True)
                    probe.attempt(f"form streamed {cuda.STREAMED}, score", case, rows=rows, copies=len(copies))
            continue
        if name == "mid":
            _forms_mid(probe, problem)
            continue
        for form in heuristics.CHOICES[name]:
            with heuristics.forms(**{name: form}):
                if name == "pairs":
                    for k in (2, 4, 8, 16):
                        case = partial(_pairs, probe, peers.ours(problem), "triton", k)
                        probe.attempt(f"form {name} {form}", case, groups=64, k=k)
                    continue
                copies = _copies(probe, problem)
                for rows in probe.rows or FORM_ROWS[name]:
                    case = partial(_score_once, probe, problem, copies, probe.hidden(rows), "triton", True)
                    probe.attempt(f"form {name} {form}, score", case, rows=rows, copies=len(copies))


def _forms_mid(probe: Probe, problem: peers.Problem) -> None:
    with cuda.mid():
        for backend in ("cuda", "triton"):
            copies = _copies(probe, problem)
            for rows in probe.rows or FORM_ROWS["mid"]:
                case = partial(_score_once, probe, problem, copies, probe.hidden(rows), backend, True)
                probe.attempt(f"form mid {backend}, score", case, rows=rows, copies=len(copies))


def large(probe: Probe) -> None:
    """The large products by each form beside the plain one: right, with the same bits, and how fast.

    Before a form is timed it is asked at small and odd sizes by few programs, which so have several tiles each; those
    rows are its proof.
    """
    problem = probe.problem()
    for form in triton_tma.FORMS:
        if form != "plain":
            weights = peers.ours(problem)
            with triton_tma.choosing(triton_tma.Large(form, 1, 5)):
                for rows in (65, 700):
                    case = partial(_score_once, probe, problem, [weights], probe.hidden(rows), "triton", False, rows)
                    probe.attempt(f"score_{form} triton", case, rows=rows)
                probe.attempt(f"accumulate_{form} triton", partial(_accumulate, probe, problem, "triton", 1300))
        with triton_tma.choosing(triton_tma.Large(form)):
            copies = _copies(probe, problem)
            for rows in probe.rows or FORM_ROWS["large"]:
                case = partial(_score_once, probe, problem, copies, probe.hidden(rows), "triton", True)
                probe.attempt(f"form large {form}, score", case, rows=rows, copies=len(copies))
            probe.attempt(f"form large-accumulate {form}", partial(_accumulate, probe, problem, "triton"))


TILES: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("project", 64, {"rows": 64, "cols": 32, "depth": 128, "warps": 4, "stages": 5}),
    ("project", 16, {"rows": 16, "cols": 64, "depth": 256, "warps": 4, "stages": 3}),
    ("product", 16, {"rows": 16, "cols": 128, "depth": 128, "warps": 4, "stages": 3, "group": 32, "fill": 1.25}),
)
"""Tiles that the tuner found as good as the table's or better in one run: (function of ``heuristics``, rows, tile)."""


def tiles(probe: Probe) -> None:
    """Each of :data:`TILES` in place of the table's, in whole calls of ``score``, side by side on the same inputs."""
    from rmcore.kernels import heuristics

    problem, device = probe.problem(), heuristics.device(probe.device)
    for kernel, rows, named in TILES:
        table = getattr(heuristics, kernel)(device, probe.dtype.itemsize, rows)
        for which, tile in (("table", table), ("named", heuristics.Tile(**named))):
            with mock.patch.object(heuristics, kernel, return_value=tile):
                copies = _copies(probe, problem)
                case = partial(_score_once, probe, problem, copies, probe.hidden(rows), "triton", True)
                probe.attempt(f"tile {kernel} {which}, score", case, rows=rows, copies=len(copies), tile=str(tile))


def _copies(probe: Probe, problem: Any) -> list[Any]:
    """The head as often as it takes to be cold; new ones, since what was planned for a head was for one form."""
    weights = peers.ours(problem)
    return [weights.clone() for _ in range(harness.rotations(weights.nbytes(), probe.device))]


def card(probe: Probe) -> None:
    """:func:`environment` and :func:`limits`, in one process."""
    environment(probe)
    limits(probe)


def self_check(probe: Probe) -> None:
    """A user's first call on a card that no shipped results stand for: each kernel checks itself, then serves.

    One operation of every kind of kernel, since a check is a process, seconds each.
    """
    heads = attribute_heads(min(probe.size, 256), 1, torch.float16).to(probe.device)
    kinds = [("score", "cuda", torch.float16), ("score", "cuda", torch.int8), ("score", "triton", torch.int8)]
    for op, backend, dtype in [*kinds, ("score_attributes", "triton", torch.float16)]:
        given = {"weights": heads} if op == "score_attributes" else {}
        probe.attempt(
            f"self-check of {kernel_of(op, dtype)}, {backend}", partial(_checked, probe, op, backend, dtype, given)
        )
    with cuda.mid():
        case = partial(_checked, probe, "score", "cuda", torch.float16, {"rows": cuda_mid.LEAST_ROWS})
        probe.attempt("self-check of score_mid, cuda", case)


def _checked(probe: Probe, op: str, backend: Any, dtype: torch.dtype, given: dict[str, Any]) -> dict[str, Any]:
    found = ops.explain(op, probe.device, dtype, backend, **given)
    if found.backend != backend:
        raise RuntimeError(found.reasons[backend])
    return {"serves": True}


STEPS: dict[str, Callable[[Probe], None]] = {
    step.__name__: step
    for step in (
        card,
        environment,
        limits,
        smoke,
        smoke_mid,
        score,
        self_check,
        versus,
        other,
        eager,
        forms,
        large,
        tiles,
    )
}


def main(argv: list[str] | None = None) -> int:
    """Run one step; 0 done, 3 the device is lost, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=list(STEPS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=whole(), default=4096, help="h = D")
    parser.add_argument("--rows", type=whole(), nargs="+")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--budget", type=real(least=0), default=0.04, help="seconds of timing a case")
    parser.add_argument("--repeats", type=whole(least=0), default=50, help="calls whose bits must be equal")
    parser.add_argument("--backends", nargs="*", default=["cuda", "triton"])
    parser.add_argument(
        "--forms", nargs="+", default=["streamed", "tail", "pairs", "launch"], help="which choices to compare"
    )
    parser.add_argument("--out", help="the rows file; default $RMCORE_GPU_ROWS, or rows.jsonl")
    probe = Probe(parser.parse_args(argv))
    try:
        STEPS[probe.step](probe)
    except KeyboardInterrupt:
        probe.write("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
