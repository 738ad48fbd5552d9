"""score: one pass g, v, u, p over B rows, ours and peers, cold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rmcore import ops
from rmcore.ops import Backend
from rmcore.ops.weights import HeadWeights

from .harness import Call, Floor, Timing, left_out, rotations, time_calls, time_in_turns
from .peers import PEERS, Peer, Problem, make_problem, ours, peer_truth, truth
from .rows import (
    absent_row,
    backends,
    dtype_name,
    error_columns,
    free,
    head_bytes,
    head_flop,
    random_rows,
    timed_row,
)
from .setup import Row, Setup

__all__ = ["score"]

COMPILED_BATCHES = (1, 16, 64, 256, 1024, 4096)


def score(setup: Setup) -> Iterator[Row]:
    """Every backend and every peer at every size and batch."""
    for h, d in setup.sizes:
        problems = {dtype: make_problem(h, d, setup.device, dtype) for dtype in setup.dtypes}
        yield from _score_ours(setup, problems)
        yield from _score_peers(setup, problems[setup.dtypes[0]])
        del problems
        free(setup.device)


@dataclass(frozen=True)
class _Cell:
    """One backend of ours at one batch: the columns of its row that are known before it is timed, and its calls."""

    backend: Backend
    dtype: torch.dtype
    calls: list[Call]
    floor: Floor
    columns: Row

    def row(self, timing: Timing, **more: float) -> Row:
        return timed_row("score", f"rmcore {self.backend}", self.dtype, timing, self.floor, **self.columns, **more)


def _score_ours(setup: Setup, problems: dict[torch.dtype, Problem]) -> Iterator[Row]:
    heads = {dtype: ours(problem) for dtype, problem in problems.items()}
    copies = {
        dtype: [head, *(head.clone() for _ in range(rotations(head.nbytes(), setup.device) - 1))]
        for dtype, head in heads.items()
    }
    slow: dict[tuple[Backend, torch.dtype], str] = {}
    for b in setup.batches:
        in_turns: list[_Cell] = []
        for dtype, problem in problems.items():
            for backend in backends("score", setup, dtype, b, heads[dtype]):
                cell = _score_cell(setup, problem, copies[dtype], backend, dtype, b, slow)
                if not isinstance(cell, _Cell):
                    yield cell
                elif backend == "cpu":
                    in_turns.append(cell)
                else:
                    yield cell.row(time_calls(cell.calls, setup.device, budget_s=setup.budget_s))
        yield from _in_turns(setup, in_turns)


def _score_cell(
    setup: Setup,
    problem: Problem,
    copies: Sequence[HeadWeights],
    backend: Backend,
    dtype: torch.dtype,
    b: int,
    slow: dict[tuple[Backend, torch.dtype], str],
) -> _Cell | Row:
    h, d, weights = problem.hidden_size, problem.num_features, copies[0]
    setup.note(f"score {h}×{d} B={b} rmcore {backend} {dtype_name(dtype)}")
    x = random_rows(b, h, setup.device, dtype)
    key = backend, dtype
    if why := slow.get(key) or left_out(partial(ops.score, x, weights, backend=backend), setup.device):
        slow[key] = f"B={b}: {why}" if key not in slow else why
        return absent_row(f"rmcore {backend}", dtype, slow[key], h, d, b)
    g, v = truth(problem, x[:64])
    result = ops.score(x, weights, backend=backend)
    out = torch.empty(4, b, device=setup.device)
    work = {"flop": head_flop(b, h, d), "bytes": head_bytes(b, h, d, dtype.itemsize)}
    return _Cell(
        backend,
        dtype,
        [partial(ops.score, x, w, backend=backend, out=out) for w in copies],
        setup.limits.floor(work["bytes"], work["flop"], dtype_name(dtype)),
        {"h": h, "d": d, "rows": b} | work | error_columns(result.logit[:64], result.variance[:64], g, v, dtype),
    )


def _in_turns(setup: Setup, cells: list[_Cell]) -> Iterator[Row]:
    """The cpu backend's rows at one batch: all dtypes in turns, and reading memory with them."""
    if not cells:
        return
    reads = setup.reads
    variants = [cell.calls for cell in cells] + ([reads.calls] if reads else [])
    timings = time_in_turns(variants, budget_s=setup.budget_s)
    for cell, timing in zip(cells, timings, strict=False):
        read = {"of_read": cell.columns["bytes"] / timing.median * timings[-1].median / reads.part} if reads else {}
        yield cell.row(timing, **read)


def _score_peers(setup: Setup, problem: Problem) -> Iterator[Row]:
    h, d = problem.hidden_size, problem.num_features
    for peer in PEERS:
        # Each batch size compiles anew, seconds a time: the main size shows what compilation brings.
        if peer.compiled and (not setup.compiled or (h, d) != setup.sizes[0]):
            continue
        weights = peer.weights(problem)
        count = rotations(sum(t.numel() * t.element_size() for t in weights), setup.device)
        copies = [weights, *(tuple(t.clone() for t in weights) for _ in range(count - 1))]
        why: str | None = None
        for b in setup.batches:
            if b <= peer.max_rows and (not peer.compiled or b in COMPILED_BATCHES):
                setup.note(f"score {h}×{d} B={b} {peer.name}")
                row = (
                    absent_row(peer.name, peer.dtype, why, h, d, b)
                    if why
                    else _score_peer(setup, problem, peer, copies, b)
                )
                why = row.get("left_out")
                yield row
        del weights, copies
        free(setup.device)


def _score_peer(setup: Setup, problem: Problem, peer: Peer, copies: Sequence[tuple[Tensor, ...]], b: int) -> Row:
    h, d = problem.hidden_size, problem.num_features
    x = random_rows(b, h, setup.device, setup.dtypes[0])
    run = torch.compile(peer.run, dynamic=False) if peer.compiled else peer.run
    try:
        if peer.compiled:
            run(x, *copies[0])
        if why := left_out(partial(run, x, *copies[0]), setup.device):
            return absent_row(peer.name, peer.dtype, f"B={b}: {why}", h, d, b)
        got = run(x, *copies[0])
        calls = [partial(run, x, *w) for w in copies]
        timing = time_calls(calls, setup.device, budget_s=setup.budget_s)
    except Exception as error:  # a peer that cannot run is reported, never silently missing
        return {"suite": "score", "variant": peer.name, "h": h, "d": d, "rows": b, "failed": str(error)[:200]}
    floor = setup.limits.floor(peer.nbytes(b, h, d), peer.flop(b, h, d), dtype_name(peer.dtype))
    g, v = peer_truth(peer, x[:64], copies[0])
    return timed_row(
        "score",
        peer.name,
        peer.dtype,
        timing,
        floor,
        h=h,
        d=d,
        rows=b,
        flop=peer.flop(b, h, d),
        bytes=peer.nbytes(b, h, d),
        **error_columns(got[0][:64], got[1][:64], g, v, peer.dtype),
    )
