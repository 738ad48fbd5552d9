"""score: one pass g, v, u, p over B rows, ours and peers, cold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from rmcore import ops
from rmcore.ops import Backend

from .harness import left_out, rotations, time_calls
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
        for dtype in setup.dtypes:
            problem = make_problem(h, d, setup.device, dtype)
            yield from _score_ours(setup, problem, dtype)
            if dtype == setup.dtypes[0]:
                yield from _score_peers(setup, problem)
            del problem
            free(setup.device)


def _score_ours(setup: Setup, problem: Problem, dtype: torch.dtype) -> Iterator[Row]:
    h, d = problem.hidden_size, problem.num_features
    weights = ours(problem)
    copies = [weights, *(weights.clone() for _ in range(rotations(weights.nbytes(), setup.device) - 1))]
    slow: dict[Backend, str] = {}
    for b in setup.batches:
        x = random_rows(b, h, setup.device, dtype)
        g, v = truth(problem, x[:64])
        for backend in backends("score", setup, dtype, b, weights):
            setup.note(f"score {h}×{d} B={b} rmcore {backend} {dtype_name(dtype)}")
            if why := slow.get(backend) or left_out(partial(ops.score, x, weights, backend=backend), setup.device):
                slow[backend] = f"B={b}: {why}" if backend not in slow else why
                yield absent_row(f"rmcore {backend}", dtype, slow[backend], h, d, b)
                continue
            result = ops.score(x, weights, backend=backend)
            out = torch.empty(4, b, device=setup.device)
            calls = [partial(ops.score, x, w, backend=backend, out=out) for w in copies]
            timing = time_calls(calls, setup.device, budget_s=setup.budget_s)
            width = dtype.itemsize
            floor = setup.limits.floor(head_bytes(b, h, d, width), head_flop(b, h, d), dtype_name(dtype))
            yield timed_row(
                "score",
                f"rmcore {backend}",
                dtype,
                timing,
                floor,
                h=h,
                d=d,
                rows=b,
                flop=head_flop(b, h, d),
                bytes=head_bytes(b, h, d, width),
                **error_columns(result.logit[:64], result.variance[:64], g, v, dtype),
            )


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
