"""Kernels that have not been shown to be right on a card prove themselves there before they serve.

On a card that no shipped results stand for (:mod:`rmcore.ops.proven`), the first call of a GPU backend's operation runs
it on small problems against plain torch, in a process of its own with a time limit: a kernel that is wrong, whose bits
move, that raises, crashes or hangs is refused, aloud, and ``auto`` goes on to the next backend. The outcome is kept on
disk by card, driver, versions and kernel sources, so a machine pays once. ``rmcore.ops.explain`` tells;
``RMCORE_SELF_CHECK=0`` turns it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmcore._base.cache import cache_folder
from rmcore._base.files import write_atomic
from rmcore._base.version import __version__
from rmcore.ops.proven import finding
from rmcore.ops.sources import build, sources

__all__ = ["TIME_LIMIT_S", "check", "refusal"]

log = logging.getLogger(__name__)

TIME_LIMIT_S = 180.0
"""For one operation's check: the process's start and Triton's compilation, which take most of it, included."""

REPEATS = 20
ROWS = (1, 17, 64, 130, 700)
MID_ROWS = (65, 129, 256, 300, 512)
# 16-bit products of up to 160 terms, relative to the largest result. A wrong kernel is off by far more than this.
_TOLERANCE = 2e-2
_H, _D = 144, 160
"""Hidden size and features of the problems: neither a power of two nor a multiple of the tiles' 128."""

_lock = threading.Lock()
_known: dict[tuple[str, str, int], str | None] = {}


def refusal(backend: str, op: str, device: torch.device) -> str | None:
    """Why an unproven kernel must not serve ``op`` on a GPU, or None. The first call for a machine takes seconds."""
    if device.type != "cuda" or backend == "torch" or os.environ.get("RMCORE_SELF_CHECK", "1") == "0":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    key = (backend, op, index)
    if key not in _known:  # every call comes by here: only the first one takes the lock
        with _lock:  # of several threads one checks and the others wait for what it finds
            if key not in _known:
                _known[key] = _looked_up(backend, op, index)
    return _known[key]


def _looked_up(backend: str, op: str, index: int) -> str | None:
    card = torch.cuda.get_device_name(index)
    found = finding(card, backend, op, _triton_version() or "")
    if found is not None:
        objection = found.objection()
        if objection is not None:
            log.warning("%s of the %s backend does not serve: %s", op, backend, objection)
            return f"{objection} (RMCORE_SELF_CHECK=0 serves it all the same)"
        if found.sources and found.sources == sources(backend, op):
            return None
    return _outcome(_file(backend, op, _machine(index)), backend, op, index, card)


def _outcome(file: Path | None, backend: str, op: str, index: int, card: str) -> str | None:
    """The outcome kept in ``file``; if there is none, of a check run now. A failure is logged once in every process."""
    try:
        why = json.loads("" if file is None else file.read_text(encoding="utf-8"))["failed"]
    except (OSError, ValueError, KeyError, TypeError):
        log.info("checking %s of the %s backend on %s, once for this machine", op, backend, card)
        why = _run(backend, op, index)
        if file is not None:
            with suppress(OSError):  # a read-only home: the check is run again next time
                write_atomic(file, json.dumps({"card": card, "backend": backend, "op": op, "failed": why}) + "\n")
    if why is None:
        return None
    log.warning("%s of the %s backend failed its self-check on %s and does not serve: %s", op, backend, card, why)
    return f"it failed its self-check on {card}: {why} (RMCORE_SELF_CHECK=0 serves it all the same)"


def _run(backend: str, op: str, index: int) -> str | None:
    """Check in a process of its own, since a kernel may hang or take the CUDA context with it."""
    command = [sys.executable, "-m", "rmcore.ops.self_check", backend, op, f"cuda:{index}"]
    environment = {**os.environ, "RMCORE_SELF_CHECK": "0"}
    try:
        child = subprocess.Popen(  # noqa: S603 (this interpreter, this module)
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return f"its check could not be started ({error})"
    try:
        out, err = child.communicate(timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return f"it did not end within {TIME_LIMIT_S:.0f} s"
    try:
        why: str | None = json.loads(out.splitlines()[-1])["failed"]
    except (IndexError, ValueError, KeyError, TypeError):
        last = (err.strip().splitlines() or ["nothing on stderr"])[-1]
        return f"its check ended with exit code {child.returncode} ({last[:200]})"
    return why


@functools.cache
def _machine(index: int) -> str:
    """Everything that could change the outcome but the kernels themselves: card, driver, versions."""
    versions: dict[str, Any] = {
        "card": torch.cuda.get_device_name(index),
        "capability": torch.cuda.get_device_capability(index),
        "driver": _driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rmcore": __version__,
        "triton": _triton_version(),
    }
    return json.dumps(versions, sort_keys=True)


def _driver() -> str:
    """The NVIDIA driver's version: torch has no public name for it, and no private one that its releases share."""
    with suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").strip()
    version = ctypes.c_int()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return f"CUDA {version.value}"


@functools.cache
def _triton_version() -> str | None:
    with suppress(ImportError):
        return str(importlib.import_module("triton").__version__)
    return None


def _file(backend: str, op: str, machine: str) -> Path | None:
    folder = cache_folder()
    name = hashlib.sha256(f"{backend} {op} {machine} {build(backend, op)}".encode()).hexdigest()[:32]
    return None if folder is None else folder / "self-check" / f"{name}.json"


# -- the checks themselves ---------------------------------------------------------------------------------------------


def check(backend: Any, op: str, device: torch.device, dtype: torch.dtype = torch.float16) -> str | None:
    """Run one operation of a backend module on small problems; what is wrong with it, or None.

    Args:
        backend: a module of :mod:`rmcore.ops.backends`, or anything with its functions.
        op: one of :data:`rmcore.ops.sources.LAUNCHED`, or of ``cuda`` ``score_mid``.
        device: where.
        dtype: of the weights.
    """
    try:
        return _CHECKS[op](backend, device, dtype)
    except Exception as error:  # whatever a kernel raises, it must not serve
        return f"{type(error).__name__}: {error}"[:400]


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _weights(device: torch.device, dtype: torch.dtype, h: int = _H, d: int = _D) -> Any:
    from rmcore.ops import reference
    from rmcore.ops.weights import FeatureMap, HeadWeights

    projection = (_random(d, h, seed=0) / (3 * h**0.5)).to(dtype)
    phase = torch.rand(d, generator=torch.Generator().manual_seed(1))
    feature_map = FeatureMap(
        features="rff", projection=projection, phase=phase, layer_weight=None, layer_bias=None, activation="none",
        layernorm=False, hidden_size=h, num_features=d, dtype=dtype,
    )  # fmt: skip
    factor = reference.pack_lower(_random(d, d, seed=2).tril() / d**0.5).to(dtype)
    weights = HeadWeights(feature_map, _random(d, seed=3).float(), 0.1, factor, 1.0, 0.4)
    return weights.to(device)


def _compare(name: str, got: Tensor, want: Tensor, tolerance: float = _TOLERANCE) -> str | None:
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    if got.shape != want.shape:
        return f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not bool(got.isfinite().all()):
        return f"{name}: NaN or Inf, or not written at all"
    error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-30)) if got.numel() else 0.0
    return f"{name}: off by {error:.1e} of the largest, {tolerance:.0e} allowed" if error > tolerance else None


def _score(backend: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    weights = _weights(device, dtype)
    batches = [_random(rows, _H, seed=rows).to(dtype).to(device) for rows in ROWS]
    return _scores(backend, weights, batches, partial(_exact, weights))


def _exact(weights: Any, hidden: Tensor) -> Tensor:
    from rmcore.ops.backends import torch as plain

    want = torch.empty(4, len(hidden), dtype=torch.float64, device=hidden.device)
    plain.score(hidden.double(), weights, want)
    return want


def _score_mid(backend: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    with backend.mid():
        for h, d in ((_H, _D), (1096, 1160)):  # a cluster or two, and ten tiles for as many as there are
            weights = _weights(device, dtype, h, d)
            for rows in MID_ROWS:
                if why := backend.declines("score", rows, weights):
                    return str(why)
            batches = [_random(rows, h, seed=rows).to(dtype).to(device) for rows in MID_ROWS]
            if why := _scores(backend, weights, batches, partial(_exact, weights)):
                return f"h = {h}: {why}"
    return None


def _score_int8(backend: Any, device: torch.device, _dtype: torch.dtype) -> str | None:
    from rmcore.ops import whole_numbers

    for hidden_size in (_H, _H // 2):  # rows in one term, and in two
        weights = _int8_weights(hidden_size).to(device)
        # 13: what serves few rows has another kernel from nine on, and none for more than sixteen.
        batches = [_random(rows, hidden_size, seed=rows) for rows in (*ROWS, 13)]
        for hidden in batches:
            hidden[-1, 3] = 300.0  # an outlier
        batches = [hidden.half().to(device) for hidden in batches]
        if why := _scores(backend, weights, batches, partial(whole_numbers.score, weights=weights)):
            return f"int8, h = {hidden_size}: {why}"
    return None


def _int8_weights(hidden_size: int) -> Any:
    from rmcore.ops.quantize import quantize_projection
    from rmcore.ops.weights import FeatureMap, HeadWeights

    projection, phase = _random(_D, hidden_size, seed=0) / (3 * hidden_size**0.5), _random(_D, seed=1)
    fields: Any = quantize_projection(projection, phase, _random(50, hidden_size, seed=4))
    feature_map = FeatureMap(
        features="rff", layer_weight=None, layer_bias=None, activation="none", layernorm=False,
        hidden_size=hidden_size, num_features=_D, dtype=torch.int8, **fields,
    )  # fmt: skip
    factor = _random(_D, _D, seed=2).tril(-1) / _D + torch.eye(_D, dtype=torch.float64)
    return HeadWeights.build(feature_map, _random(_D, seed=3), 0.1, factor, 0.4)


def _scores(backend: Any, weights: Any, batches: Sequence[Tensor], truth: Callable[[Tensor], Tensor]) -> str | None:
    """Scores of each batch: every repeat's bits, and the numbers against ``truth``."""
    declines = getattr(backend, "declines", lambda *_: None)
    for hidden in batches:
        rows = len(hidden)
        if declines("score", rows, weights) is not None:
            continue
        want = truth(hidden)
        first: Tensor | None = None
        for _ in range(REPEATS):
            out = torch.full((4, rows), float("nan"), device=hidden.device)
            backend.score(hidden, weights, out)
            first = out.clone() if first is None else first
            if not torch.equal(first.cpu().view(torch.int32), out.cpu().view(torch.int32)):
                return f"score of {rows} rows: bits move from call to call"
        assert first is not None
        for name, k in (("g", 0), ("v", 1), ("u", 2), ("p", 3)):
            if why := _compare(f"score of {rows} rows, {name}", first[k], want[k]):
                return why
    return None


def _accumulate(backend: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    from rmcore.ops.backends import torch as plain
    from rmcore.ops.tasks import AccumulateTask

    feature_map = _weights(device, dtype).map
    rows = 300
    hidden = _random(rows, _H, seed=5).to(dtype).to(device)
    beta = (_random(_D, seed=6) / 8).float().to(device)
    index = torch.randint(rows, (200, 2), generator=torch.Generator().manual_seed(7)).to(device)
    for pairs in (None, index):
        count = rows if pairs is None else len(pairs)
        labels = torch.randint(2, (count,), generator=torch.Generator().manual_seed(8)).float().to(device)

        def total(module: Any, rows: Tensor, kind: torch.dtype, labels: Tensor = labels, pairs: Any = pairs) -> Any:
            precision = torch.zeros(_D, _D, dtype=kind, device=device)
            gradient = torch.zeros(_D, dtype=kind, device=device)
            task = AccumulateTask(rows, labels.to(kind), feature_map, beta.to(kind), precision, gradient, pairs)
            return module.accumulate(task), precision.tril(), gradient

        want = total(plain, hidden.double(), torch.float64)
        got = total(backend, hidden, torch.float32)
        for name, a, b in zip(("log-likelihood", "precision", "gradient"), got, want, strict=True):
            if why := _compare(f"accumulate of {count} {'rows' if pairs is None else 'pairs'}, {name}", a, b):
                return why
    return None


def _pair_variance(backend: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    from rmcore.ops.backends import torch as plain

    weights = _weights(device, dtype)
    for listed in ([1, 2, 5, 0, 8, 3], [4] * 9):  # kernels may treat groups of one size in a way of their own
        sizes = torch.tensor(listed)
        hidden = _random(int(sizes.sum()), _H, seed=9).to(dtype).to(device)
        got, want = backend.pair_variance(hidden, sizes, weights), plain.pair_variance(hidden.double(), sizes, weights)
        for name, a, b in zip(("g", "v"), got, want, strict=True):
            if why := _compare(f"pair_variance of groups of {listed[0]} and so on, {name}", a, b):
                return why
    return None


def _power_iteration(backend: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    from rmcore.ops.backends import torch as plain

    matrix, vector = (_random(96, _H, seed=10) / 12).to(dtype).to(device), _random(_H, seed=11).float().to(device)
    got, want = backend.power_iteration(matrix, vector, 3), plain.power_iteration(matrix.double(), vector.double(), 3)
    for name, a, b in zip(("sigma", "vector"), got, want, strict=True):
        if why := _compare(f"power_iteration, {name}", a, b):
            return why
    return None


def _score_attributes(backend: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    from rmcore.ops.attribute_weights import SUMMARY, AttributeWeights
    from rmcore.ops.backends import torch as plain

    members, attributes = 2, 5
    for softmax, rows in (*((False, n) for n in ROWS[::2]), (True, ROWS[1])):
        layers = [_random(members, 96, k, seed=20 + k) / k**0.5 for k in (_H, 96)]
        heads = AttributeWeights.build(
            _random(members, 2 * attributes, _H, seed=12) / _H**0.5, dtype=dtype, layers=tuple(layers),
            biases=(_random(members, 96, seed=13), _random(members, 96, seed=14)),
            last=_random(members, attributes, 96, seed=15) / 8, last_bias=_random(members, attributes, seed=16),
            softmax=softmax,
        ).to(device)  # fmt: skip
        hidden = _random(rows, _H, seed=rows).to(dtype).to(device)
        want = plain.score_attributes(hidden.double(), heads, None)
        summary, outputs, weights = first = backend.score_attributes(hidden, heads, None)
        for name, a, b in (
            *zip(SUMMARY, summary, want[0], strict=True),
            ("outputs", outputs, want[1]),
            ("weights", weights, want[2]),
        ):
            if why := _compare(f"score_attributes of {rows} rows, {name}", a, b):
                return why
        for _ in range(REPEATS - 1):
            if not all(map(torch.equal, first, backend.score_attributes(hidden, heads, None))):
                return f"score_attributes of {rows} rows: bits move from call to call"
    return None


def _formed(
    op: Callable[..., str | None], form: str, backend: Any, device: torch.device, dtype: torch.dtype
) -> str | None:
    """A check of the ``triton`` backend's other form, by few programs, which so have several tiles each."""
    from rmcore.ops.backends import triton_tma

    with triton_tma.choosing(triton_tma.Large(form, 1, 3)):
        return op(backend, device, dtype)


_CHECKS: dict[str, Callable[..., str | None]] = {
    "score": _score,
    "score_int8": _score_int8,
    "score_mid": _score_mid,
    "accumulate": _accumulate,
    "pair_variance": _pair_variance,
    "power_iteration": _power_iteration,
    "score_attributes": _score_attributes,
    "score_persistent": partial(_formed, _score, "persistent"),
    "score_specialized": partial(_formed, _score, "specialized"),
    "accumulate_persistent": partial(_formed, _accumulate, "persistent"),
    "accumulate_specialized": partial(_formed, _accumulate, "specialized"),
}


def main(argv: list[str] | None = None) -> int:
    """The child: check one operation and print one JSON line."""
    backend, op, device = sys.argv[1:] if argv is None else argv
    module = importlib.import_module(f"rmcore.ops.backends.{backend}")
    print(json.dumps({"failed": check(module, op, torch.device(device))}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
