"""What is measured: one function a suite, each giving rows for the results file.

score            one pass g, v, u, p over B rows, ours and peers, cold
accumulate       the covariance pass over N rows
power_iteration  one step of σ(W)
pair_variance    all pairs of G groups of K
attributes       multi-attribute heads with gates, one and an ensemble of three
eager            the host's time before a score's kernels start
engine           score_hidden(...).rewards beside the kernel it is built on
share            the head's part of a whole scoring step, hidden states at hand and behind a backbone
memory           bytes of weights, build time and first call
encode           whole groups through a backbone: padded rows, sorted rows, packed trees (only when asked for)
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rmcore import ops
from rmcore.ops import Backend, reference
from rmcore.ops.weights import FeatureMap

from .attributes import attributes
from .eager import eager
from .encode import encode
from .engine import engine
from .harness import Floor, Timing, as_dict, left_out, relative_error, rotations, synchronize, time_calls
from .peers import PEERS, TOLERANCE, Peer, Problem, make_problem, ours, peer_truth, truth
from .setup import Row, Setup

__all__ = ["SUITES"]

COMPILED_BATCHES = (1, 16, 64, 256, 1024, 4096)


def _backends(op: str, setup: Setup, dtype: torch.dtype, rows: int, weights: Any) -> list[Backend]:
    names: tuple[Backend, ...] = ("cuda", "triton", "cpu", "torch")
    told = (ops.explain(op, setup.device, dtype, name, rows=rows, weights=weights) for name in names)
    return [name for name, explanation in zip(names, told, strict=True) if explanation.backend != "none"]


def _row(suite: str, variant: str, dtype: torch.dtype, timing: Timing, floor: Floor, **more: Any) -> Row:
    return {
        "suite": suite,
        "variant": variant,
        "dtype": str(dtype).removeprefix("torch."),
        **more,
        **{f"{name}_s" if name in ("median", "low", "high") else name: v for name, v in as_dict(timing).items()},
        **floor.beside(timing.median),
    }


def _floating(dtypes: Iterable[torch.dtype]) -> list[torch.dtype]:
    return [dtype for dtype in dtypes if dtype.is_floating_point]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def head_bytes(rows: int, h: int, d: int, width: int) -> float:
    """Folded projection and half of U, each read once, hidden rows in and four floats a row out."""
    return width * (h * d + d * (d + 1) / 2) + rows * (h * width + 16)


def head_flop(rows: int, h: int, d: int) -> float:
    """Multiply-adds of the folded projection and of the lower triangle."""
    return 2.0 * rows * (h * d + d * (d + 1) / 2)


# -- score -----------------------------------------------------------------------------------------------------------


def score(setup: Setup) -> Iterator[Row]:
    """Every backend and every peer at every size and batch."""
    for h, d in setup.sizes:
        for dtype in setup.dtypes:
            problem = make_problem(h, d, setup.device, dtype)
            yield from _score_ours(setup, problem, dtype)
            if dtype == setup.dtypes[0]:
                yield from _score_peers(setup, problem)
            del problem
            _free(setup.device)


def _score_ours(setup: Setup, problem: Problem, dtype: torch.dtype) -> Iterator[Row]:
    h, d = problem.hidden_size, problem.num_features
    weights = ours(problem)
    copies = [weights, *(weights.clone() for _ in range(rotations(weights.nbytes(), setup.device) - 1))]
    slow: dict[Backend, str] = {}
    for b in setup.batches:
        x = _hidden(b, h, setup.device, dtype)
        g, v = truth(problem, x[:64])
        for backend in _backends("score", setup, dtype, b, weights):
            setup.note(f"score {h}×{d} B={b} rmcore {backend} {_name(dtype)}")
            if why := slow.get(backend) or left_out(partial(ops.score, x, weights, backend=backend), setup.device):
                slow[backend] = f"B={b}: {why}" if backend not in slow else why
                yield _absent(f"rmcore {backend}", dtype, slow[backend], h, d, b)
                continue
            result = ops.score(x, weights, backend=backend)
            out = torch.empty(4, b, device=setup.device)
            calls = [partial(ops.score, x, w, backend=backend, out=out) for w in copies]
            timing = time_calls(calls, setup.device, budget_s=setup.budget_s)
            width = dtype.itemsize
            floor = setup.limits.floor(head_bytes(b, h, d, width), head_flop(b, h, d), _name(dtype))
            yield _row(
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
                **_errors(result.logit[:64], result.variance[:64], g, v, dtype),
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
                    _absent(peer.name, peer.dtype, why, h, d, b)
                    if why
                    else _score_peer(setup, problem, peer, copies, b)
                )
                why = row.get("left_out")
                yield row
        del weights, copies
        _free(setup.device)


def _score_peer(setup: Setup, problem: Problem, peer: Peer, copies: Sequence[tuple[Tensor, ...]], b: int) -> Row:
    h, d = problem.hidden_size, problem.num_features
    x = _hidden(b, h, setup.device, setup.dtypes[0])
    run = torch.compile(peer.run, dynamic=False) if peer.compiled else peer.run
    try:
        if peer.compiled:
            run(x, *copies[0])
        if why := left_out(partial(run, x, *copies[0]), setup.device):
            return _absent(peer.name, peer.dtype, f"B={b}: {why}", h, d, b)
        got = run(x, *copies[0])
        calls = [partial(run, x, *w) for w in copies]
        timing = time_calls(calls, setup.device, budget_s=setup.budget_s)
    except Exception as error:  # a peer that cannot run is reported, never silently missing
        return {"suite": "score", "variant": peer.name, "h": h, "d": d, "rows": b, "failed": str(error)[:200]}
    floor = setup.limits.floor(peer.nbytes(b, h, d), peer.flop(b, h, d), _name(peer.dtype))
    g, v = peer_truth(peer, x[:64], copies[0])
    return _row(
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
        **_errors(got[0][:64], got[1][:64], g, v, peer.dtype),
    )


def _absent(variant: str, dtype: torch.dtype, why: str, h: int, d: int, rows: int, suite: str = "score") -> Row:
    """A variant that is too slow here to be timed: said, never silently missing."""
    return {
        "suite": suite,
        "variant": variant,
        "dtype": _name(dtype),
        "h": h,
        "d": d,
        "rows": rows,
        "left_out": why,
    }


def _errors(g: Tensor, v: Tensor, true_g: Tensor, true_v: Tensor, dtype: torch.dtype) -> Row:
    error = relative_error(v, true_v)
    return {"error_v": error, "error_g": relative_error(g, true_g), "right": error <= TOLERANCE[dtype]}


# -- accumulate ------------------------------------------------------------------------------------------------------


def accumulate(setup: Setup) -> Iterator[Row]:
    """The covariance pass, against torch features and one dense product."""
    count = 8192 if setup.device.type == "cpu" else 65536
    if setup.budget_s < 0.5:
        count //= 8
    for h, d in setup.sizes:
        for dtype in _floating(setup.dtypes):  # int8 maps are accumulated as float32 ones
            problem = make_problem(h, d, setup.device, dtype)
            yield from _accumulate(setup, problem, dtype, count)
            del problem
            _free(setup.device)


def _accumulate(setup: Setup, problem: Problem, dtype: torch.dtype, count: int) -> Iterator[Row]:
    h, d, feature_map, device = problem.hidden_size, problem.num_features, problem.feature_map, setup.device
    x = _hidden(count, h, device, dtype)
    labels, beta = torch.ones(count, device=device), torch.zeros(d, device=device)
    precision, gradient = torch.zeros(d, d, device=device), torch.zeros(d, device=device)
    flop = 2.0 * count * (h * d + d * (d + 1) / 2)
    sizes = {"h": h, "d": d, "rows": count, "flop": flop}
    floor = setup.limits.floor(0.0, flop, _name(dtype))
    expected = _gram_diagonal(feature_map, x)
    for backend in _backends("accumulate", setup, dtype, count, feature_map):
        if backend == "torch":
            continue
        setup.note(f"accumulate {h}×{d} N={count} rmcore {backend} {_name(dtype)}")

        def run(name: Backend = backend) -> None:
            ops.accumulate(
                x,
                labels,
                feature_map,
                beta,
                precision=precision,
                gradient=gradient,
                backend=name,
            )

        precision.zero_()
        run()
        error = relative_error(precision.diagonal(), expected / 4)  # p(1−p) = ¼ at β = 0
        timing = time_calls([run], device, budget_s=setup.budget_s, min_samples=3)
        yield _row("accumulate", f"rmcore {backend}", dtype, timing, floor, **sizes, error_v=error, right=error < 1e-2)
    if dtype != setup.dtypes[0]:
        return
    for kind in (torch.float32, dtype):
        setup.note(f"accumulate {h}×{d} N={count} torch {_name(kind)}")
        assert feature_map.projection is not None
        projection, phase = feature_map.projection.to(kind), problem.phase
        rows, gram = x.to(kind), torch.zeros(d, d, dtype=kind, device=device)

        dense = partial(_dense_accumulate, rows, projection, phase, gram)
        timing = time_calls([dense], device, budget_s=setup.budget_s, min_samples=3)
        floor = setup.limits.floor(0.0, 2.0 * count * (h * d + d * d), _name(kind))
        name = f"torch features + P.addmm_ {_name(kind)}"
        yield _row("accumulate", name, kind, timing, floor, **sizes)


def _dense_accumulate(rows: Tensor, projection: Tensor, phase: Tensor, gram: Tensor) -> None:
    phi = torch.cos(2 * torch.pi * ((rows @ projection.mT).float() + phase)).to(gram.dtype)
    gram.addmm_(phi.mT, phi)


def _gram_diagonal(feature_map: FeatureMap, x: Tensor) -> Tensor:
    total = torch.zeros(feature_map.num_features, dtype=torch.float64, device=x.device)
    for start in range(0, len(x), 4096):
        phi = feature_map(x[start : start + 4096].float()) * feature_map.feature_scale
        total += phi.double().square().sum(0)
    return total


# -- power iteration and pair variance -------------------------------------------------------------------------------


def power_iteration(setup: Setup) -> Iterator[Row]:
    """One step of power iteration, against two matrix-vector products."""
    for h, _ in setup.sizes:
        for dtype in dict.fromkeys((torch.float32, *_floating(setup.dtypes))):
            weight = torch.randn(h, h, device=setup.device).to(dtype)
            vector = torch.randn(h, device=setup.device)
            copies = [weight.clone() for _ in range(rotations(weight.numel() * weight.element_size(), setup.device))]
            floor = setup.limits.floor(weight.numel() * weight.element_size(), 4.0 * h * h, "float32")
            sigma = reference.power_iteration(weight.double(), vector.double(), 1)[0]
            for backend in _backends("power_iteration", setup, dtype, h, None):
                setup.note(f"power_iteration {h} rmcore {backend} {_name(dtype)}")
                calls = [partial(ops.power_iteration, w, vector, 1, backend=backend) for w in copies]
                try:
                    error = relative_error(ops.power_iteration(weight, vector, 1, backend=backend)[0], sigma)
                    timing = time_calls(calls, setup.device, budget_s=setup.budget_s / 2)
                except RuntimeError as failure:
                    yield {"suite": "power_iteration", "variant": f"rmcore {backend}", "failed": str(failure)[:200]}
                    continue
                name = "torch, two products" if backend == "torch" else f"rmcore {backend}"
                right = {"error_v": error, "right": error < TOLERANCE[dtype]}
                yield _row("power_iteration", name, dtype, timing, floor, h=h, d=h, rows=1, **right)


def pair_variance(setup: Setup) -> Iterator[Row]:
    """All pairs of 64 groups of 4 and of 8, against all pair differences through a dense P⁻¹."""
    h, d = setup.sizes[0]
    for dtype in setup.dtypes:
        problem = make_problem(h, d, setup.device, dtype)
        weights = ours(problem)
        for groups, k in ((64, 4), (64, 8)):
            x = _hidden(groups * k, h, setup.device, dtype)
            sizes = torch.full((groups,), k, dtype=torch.int64)
            g, v = _all_pairs(problem, x.double(), k, problem.precision.inverse())
            shape = {"h": h, "d": d, "rows": groups * k, "k": k}
            floor = setup.limits.floor(
                head_bytes(groups * k, h, d, dtype.itemsize), head_flop(groups * k, h, d), _name(dtype)
            )
            for backend in _backends("pair_variance", setup, dtype, groups * k, weights):
                setup.note(f"pair_variance {groups}×{k} rmcore {backend} {_name(dtype)}")
                got = ops.pair_variance(x, sizes, weights, backend=backend)
                call = partial(ops.pair_variance, x, sizes, weights, backend=backend)
                timing = time_calls([call], setup.device, budget_s=setup.budget_s / 2)
                errors = _errors(got[0], got[1], g, v, dtype)
                yield _row("pair_variance", f"rmcore {backend}", dtype, timing, floor, **shape, **errors)
            if dtype == setup.dtypes[0]:
                setup.note(f"pair_variance {groups}×{k} torch dense")
                run = partial(_all_pairs, problem, x.float(), k, problem.inverse)
                timing = time_calls([run], setup.device, budget_s=setup.budget_s / 2)
                yield _row("pair_variance", "torch, differences through P⁻¹", torch.float32, timing, floor, **shape)
        del problem, weights
        _free(setup.device)


def _all_pairs(problem: Problem, x: Tensor, k: int, inverse: Tensor) -> tuple[Tensor, Tensor]:
    phi = problem.feature_map(x) * problem.scale
    i, j = torch.triu_indices(k, k, 1, device=x.device)
    groups = phi.view(-1, k, phi.shape[1])
    delta = (groups[:, i] - groups[:, j]).flatten(0, 1)
    return delta @ problem.beta.to(delta.dtype), ((delta @ inverse.to(delta.dtype)) * delta).sum(-1)


# -- share and memory ------------------------------------------------------------------------------------------------


def share(setup: Setup) -> Iterator[Row]:
    """The head's part of a step that scores 64 pairs, for hidden states at hand and behind a backbone."""
    pairs, tokens = 64, 256 if setup.device.type == "cuda" else 32
    shape, hidden_size, run = _backbone(setup, pairs, tokens)
    h, d = hidden_size, setup.sizes[0][1]
    dtype = setup.dtypes[0]
    problem = make_problem(h, d, setup.device, dtype)
    weights = ours(problem)
    x = _hidden(pairs, h, setup.device, dtype)
    setup.note(f"share: {shape}")
    backbone = time_calls([run], setup.device, budget_s=setup.budget_s, min_samples=3)
    heads: list[tuple[str, Callable[[], object]]] = [("rmcore", partial(ops.score, x, weights))]
    for peer in PEERS:
        if not peer.compiled:
            kept = peer.weights(problem)
            heads.append((peer.name, partial(peer.run, x, *kept)))
    for name, call in heads:
        if why := left_out(call, setup.device):
            yield _absent(name, dtype, why, h, d, pairs, "share")
            continue
        timing = time_calls([call], setup.device, budget_s=setup.budget_s / 2)
        part = timing.median / (timing.median + backbone.median)
        yield {
            "suite": "share",
            "variant": name,
            "h": h,
            "d": d,
            "rows": pairs,
            "tokens_per_pair": tokens,
            "backbone": shape,
            "backbone_s": backbone.median,
            "median_s": timing.median,
            "share_behind_backbone": part,
            "share_hidden_at_hand": 1.0,
        }


def _backbone(setup: Setup, pairs: int, tokens: int) -> tuple[str, int, Callable[[], object]]:
    from transformers import LlamaConfig, LlamaModel

    if setup.device.type == "cuda":
        name, dtype = "Llama-3.1-8B shape, random weights, bf16", torch.bfloat16
        shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        shape |= {"num_key_value_heads": 8}
    else:
        name, dtype = "SmolLM2-135M shape, random weights, fp32", torch.float32
        shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
        shape |= {"num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=32000, **shape)
    with torch.device(setup.device):
        model = LlamaModel(config).to(dtype).eval()
    ids = torch.randint(0, 32000, (pairs, tokens), device=setup.device)

    def run() -> object:
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False).last_hidden_state

    return f"{name}, {pairs} × {tokens} tokens", int(shape["hidden_size"]), run


def memory(setup: Setup) -> Iterator[Row]:
    """Bytes each variant keeps, and seconds to build it and to make its first call."""
    h, d = setup.sizes[0]
    for dtype in setup.dtypes:
        problem = make_problem(h, d, setup.device, dtype)
        x = _hidden(1, h, setup.device, dtype)
        for backend in _backends("score", setup, dtype, 1, ours(problem)):
            built, weights = _timed(partial(ours, problem), setup.device)
            weights = weights.clone()  # its map is the problem's, which keeps what other backends made of it
            first, _ = _timed(partial(ops.score, x, weights, backend=backend), setup.device)
            held = sum(t.numel() * t.element_size() for t in _tensors(weights))
            yield {
                "suite": "memory",
                "variant": f"rmcore {backend}",
                "dtype": _name(dtype),
                "h": h,
                "d": d,
                "bytes": weights.nbytes(),
                "repacked_bytes": held - weights.nbytes(),
                "build_s": built,
                "first_call_s": first,
            }
        if dtype == setup.dtypes[0]:
            for peer in PEERS:
                if peer.compiled and not setup.compiled:
                    continue
                built, kept = _timed(partial(_cloned, peer, problem), setup.device)
                run = torch.compile(peer.run) if peer.compiled else peer.run
                first, _ = _timed(partial(run, x, *kept), setup.device)
                nbytes = sum(t.numel() * t.element_size() for t in kept)
                row = {"suite": "memory", "variant": peer.name, "dtype": _name(peer.dtype), "h": h, "d": d}
                yield {**row, "bytes": nbytes, "build_s": built, "first_call_s": first}
        del problem
        _free(setup.device)


def _tensors(value: Any) -> set[Tensor]:
    """Every tensor an object holds, caches included, however it nests them."""
    if isinstance(value, Tensor):
        return {value}
    if isinstance(value, dict):
        items: Iterable[Any] = value.values()
    elif isinstance(value, (list, tuple, set)):
        items = value
    elif hasattr(value, "__dict__"):
        items = vars(value).values()
    else:
        return set()
    return {tensor for item in items for tensor in _tensors(item)}


def _cloned(peer: Peer, problem: Problem) -> tuple[Tensor, ...]:
    return tuple(t.clone() for t in peer.weights(problem))


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    synchronize(device)
    started = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - started, result


def _hidden(rows: int, h: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    dtype = torch.bfloat16 if dtype == torch.int8 else dtype  # int8 heads take rows as a model gives them
    return torch.randn(rows, h, generator=torch.Generator().manual_seed(rows)).to(dtype).to(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


SUITES: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "score": score,
    "accumulate": accumulate,
    "power_iteration": power_iteration,
    "pair_variance": pair_variance,
    "attributes": attributes,
    "eager": eager,
    "engine": engine,
    "share": share,
    "memory": memory,
    "encode": encode,
}
