"""Compile every Triton kernel for GPUs that are not here, and read what the assembler says about each.

    python tests/kernels/compile_triton.py [--quick] [--archs 80 90 100] [--int8 89 120] [--workers 2] [--json FILE]

The backend itself is run, on meta tensors, with a stand-in for Triton's driver: whatever it would launch for a device,
with the very specialisations it would have, is compiled and not launched. Fails on a spilled byte but for
those of :data:`ALLOWED_SPILLS`, on shared memory beyond the device's, and on matrix instructions that cannot overlap.
Not for a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import compile_tma
import torch

SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory one program may have, by compute capability."""
KIND = {80: "sm80", 89: "portable", 90: "sm90", 100: "sm100", 120: "portable"}
MULTIPROCESSORS = {80: 108, 89: 142, 90: 132, 100: 148, 120: 170}

DESCRIBED = {
    "project_tma_kernel", "column_persistent_kernel", "column_specialized_kernel", "gram_persistent_kernel",
    "gram_specialized_kernel",
}  # fmt: skip
"""Kernels whose operands come by descriptors."""

ALLOWED_SPILLS: dict[tuple[str, int, str], tuple[int, ...]] = {
    ("3.6", 80, "weigh_kernel"): (24,),
    ("3.6", 100, "project_kernel"): (352,),
    ("3.9", 80, "step_kernel"): (8, 86),
}
"""Bytes that may be spilled, of each build of a kernel that spills: (Triton, compute capability, kernel) to bytes.

``weigh_kernel`` (pairs in 64 x 128 blocks, 255 registers a thread) and ``step_kernel`` at 16,384 columns (a row a
program, all 128 registers that 512 threads may have) keep a few bytes aside once a block or a row; so does
the widest tile of ``project_kernel`` on sm_100 with Triton 3.6, once a program. Their tiles are in heuristics.py, which
every proof of an H100 covers (rmcore/ops/proven.json), and on which nothing spills: to be changed with what is measured
there next.
"""


class Build(NamedTuple):
    """One compiled kernel: what it was compiled from, and what it takes."""

    arch: int
    kernel: str
    constants: str
    warps: int
    stages: int
    registers: int
    shared: int
    spills: int
    unit: str
    serialized: bool
    waits: bool  # for the kernel before it, which a program must before anything else if it may start early
    plain: (
        bool  # a product of 16-bit or int8 operands in tiles that Hopper's matrix instructions could take, without them
    )
    widened: bool  # whole numbers that are multiplied as something else than bytes
    counts: bool  # itself, so that the last program to come finds what all others have stored
    early: bool  # counts itself before all of its threads have stored
    boxes: int  # loads by descriptor
    torn: bool  # one of them is of another size than where it goes


# -- the workload: calls that between them reach every row of every table ---------------------------------------------


def calls(arch: int, quick: bool) -> Iterator[Callable[[], None]]:
    """The backend's operations on meta tensors, at the sizes where the tables change."""
    from rmcore.kernels import heuristics

    half, single = torch.float16, torch.float32

    def limits(dtype: torch.dtype) -> list[int]:
        tables = (heuristics._PROJECT, heuristics._PRODUCT)
        found = {limit for table in tables for limit, _ in table[KIND[arch], dtype.itemsize]}
        return sorted(int(limit) if limit < 1e9 else 8192 for limit in found)

    yield from _other_forms(arch, quick)
    if arch == 90:
        yield from compile_tma.calls(quick, _weights, _score, _accumulate)
    square = {dtype: _weights(4096, 4096, dtype) for dtype in (half, torch.bfloat16, single)}
    normed = _weights(4096, 4096, half, layer=4096, activation="tanh", layernorm=True)
    if quick:
        for rows in (16, 8192):
            yield functools.partial(_score, square[half], rows, half)
        yield functools.partial(_score, normed, 128, half)
        yield functools.partial(_accumulate, square[half], torch.float64, half)
        yield functools.partial(_pair_variance, square[half], half, (128,))
        yield functools.partial(_power, 4096, single)
        yield functools.partial(_score, square[single], 128, single)
        yield functools.partial(_score, square[half], 8192, torch.bfloat16)
        for rows in (16, 8192):
            yield functools.partial(_score_attributes, _heads(4096, half), rows, half)
        yield functools.partial(_score_attributes, _heads(4096, half, per=19, softmax=True, depth=3), 128, half)
        yield from _int8_calls(arch, (16, 128, 8192), quick)
        return
    for dtype, weights in square.items():
        for rows in limits(dtype):
            yield functools.partial(_score, weights, rows, dtype)
        yield functools.partial(_score, _weights(8192, 8192, dtype), 1024, dtype)
        for d in (4096, 8192):
            for precision in (torch.float32, torch.float64):
                yield functools.partial(_accumulate, _weights(d, d, dtype), precision, dtype)
        yield functools.partial(_pair_variance, weights, dtype, (8, 16, 32, 128, 512))
        for h in (1024, 4096, 5120, 16384):
            yield functools.partial(_power, h, dtype)
    yield from _attribute_calls(limits)
    yield from _int8_calls(arch, (), quick)
    for dtype, foreign in ((half, torch.bfloat16), (single, half)):
        tanh = _weights(4096, 4096, dtype, layer=4096, activation="tanh")
        for rows in limits(dtype):
            yield functools.partial(_score, normed if dtype == half else tanh, rows, dtype)
            yield functools.partial(_score, tanh, rows, dtype)
            yield functools.partial(_score, square[dtype], rows, foreign)
            yield functools.partial(_score, _weights(1003, 1003, dtype), rows - 1, dtype)
            yield functools.partial(_score, _weights(448, 1008, dtype), rows, dtype)
        odd, tiny = _weights(1003, 1003, dtype), _weights(1, 1, dtype)  # where every size and stride is 1
        for rows in (1, 65, 2000):
            yield functools.partial(_score, tiny, rows, dtype)
        yield functools.partial(_accumulate, tiny, torch.float64, dtype, 2)
        yield functools.partial(_pair_variance, tiny, dtype, (1, 200))
        yield functools.partial(_power, 1, dtype, 1)
        yield functools.partial(_accumulate, odd, torch.float32, dtype, 1001, likelihood="gaussian")
        yield functools.partial(_accumulate, odd, torch.float32, dtype, 1001, weighted=True)
        yield functools.partial(_score, _weights(4096, 4096, dtype, projection=False), 64, dtype)
        yield functools.partial(_score, _weights(4096, 4096, dtype, features="linear"), 64, dtype)


def _attribute_calls(limits: Callable[[torch.dtype], list[int]]) -> Iterator[Callable[[], None]]:
    """Gates of either kind at every row of the table; heads without one, and of sizes that are no whole tiles."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        gated = _heads(4096, dtype)
        for rows in limits(dtype):
            yield functools.partial(_score_attributes, gated, rows, dtype)
            yield functools.partial(_score_attributes, _heads(4096, dtype, 3, softmax=True, width=1024), rows, dtype)
        foreign = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
        for rows in (16, 100, 1024):
            yield functools.partial(_score_attributes, gated, rows, foreign)
            yield functools.partial(_score_attributes, _heads(1003, dtype, 2, per=19, depth=1, width=333), rows, dtype)
        yield functools.partial(_score_attributes, _heads(4096, dtype, depth=0), 64, dtype)
        yield functools.partial(_score_attributes, gated, 64, dtype, prompts=True)


def _int8_calls(arch: int, sizes: tuple[int, ...], quick: bool) -> Iterator[Callable[[], None]]:
    """int8 heads at every row of their tables: rows in one term and in two, of any dtype, and odd sizes."""
    from rmcore.kernels import heuristics_int8

    whole, half = torch.int8, torch.float16
    tables = (heuristics_int8._PROJECT, heuristics_int8._TWO_TERMS, heuristics_int8._PRODUCT)
    limits = sorted({8192 if limit > 8192 else int(limit) for table in tables for limit, _ in table[KIND[arch]]})
    heads = _weights(4096, 4096, whole), _weights(2048, 4096, whole, balanced=True)
    for rows in sizes or limits:
        for head in heads:
            yield functools.partial(_score, head, rows, half)
    if not quick:
        for rows in limits:
            yield functools.partial(_score, _weights(1003, 1003, whole, balanced=True), rows - 1, torch.bfloat16)
            yield functools.partial(_score, _weights(448, 1008, whole), rows, torch.float32)
            yield functools.partial(_score, _weights(16384, 1024, whole), rows, half)
            yield functools.partial(_score, _weights(16384, 1024, whole, balanced=True), rows, half)
        yield functools.partial(_score, _weights(1, 1, whole), 1, half)
        yield functools.partial(_score, _weights(8192, 8192, whole), 1024, half)


def _other_forms(arch: int, quick: bool) -> Iterator[Callable[[], None]]:
    """What the tables do not choose but may come to: it must be as sound as what they do."""
    from rmcore.kernels import heuristics

    half = torch.float16
    weights = _weights(4096, 4096, half)

    def chosen(call: Callable[[], None], **forms: str) -> None:
        with heuristics.forms(**forms):
            call()

    for k in (2, 4, 8, 16):
        yield functools.partial(chosen, functools.partial(_pair_variance, weights, half, (64,), k), pairs="by groups")
    for groups in (64,) if quick else (2, 8, 32, 64, 512):
        for k in (4, 8) if quick else (2, 4, 8):
            for dtype in (half,) if quick else (half, torch.float32):
                call = functools.partial(_pair_variance, _weights(4096, 4096, dtype), dtype, (groups,), k)
                yield functools.partial(chosen, call, pairs="in the product")
    for rows in (16, 64, 8192) if quick else (16, 32, 64, 128, 256, 512, 1024, 8192):
        yield functools.partial(chosen, functools.partial(_score, weights, rows, half), tail="last")
    if not quick:
        for dtype in (torch.bfloat16, torch.float32):
            for rows in (16, 64, 1024):
                other = functools.partial(_score, _weights(4096, 4096, dtype), rows, dtype)
                yield functools.partial(chosen, other, tail="last")
    if arch == 90 and not quick:
        from rmcore.bench import gpu_probe

        for kernel, rows, named in gpu_probe.TILES:
            tile = heuristics.Tile(**named)
            with_tile = mock.patch.object(heuristics, kernel, lambda *_, tile=tile: tile)
            yield with_tile(functools.partial(_score, weights, rows, half))
    if arch >= 90:
        for rows in (1, 64, 256, 1024):
            yield functools.partial(chosen, functools.partial(_score, weights, rows, half), launch="overlapped")
        tile = heuristics.Tile(128, 256, 64, 8, 4, tail=True)

        def gram() -> None:
            with mock.patch.object(heuristics, "gram", return_value=tile):
                _accumulate(weights, torch.float32, half)

        if arch == 90:
            yield gram


def _weights(
    h: int, d: int, dtype: torch.dtype, *, layer: int = 0, activation: str = "none", layernorm: bool = False,
    features: str = "rff", projection: bool = True, balanced: bool = False,
) -> Any:  # fmt: skip
    from rmcore.ops.weights import FeatureMap, HeadWeights

    whole = dtype == torch.int8
    meta: Callable[..., torch.Tensor] = functools.partial(torch.empty, device="meta")
    feature_map = FeatureMap(
        features if projection else "linear",  # type: ignore[arg-type]
        meta(d, layer or h, dtype=dtype) if projection else None,
        meta(d) if projection else None,
        meta(layer, h, dtype=dtype) if layer else None,
        meta(layer) if layer else None,
        activation,  # type: ignore[arg-type]
        layernorm,
        h,
        d,
        dtype,
        projection_scale=meta(d) if whole else None,
        hidden_shift=meta(h) if balanced else None,
        hidden_scale=meta(h) if balanced else None,
    )
    n = math.ceil(d / 128)
    apart = (meta(d), meta(d)) if whole else ()  # factors of U's rows, and its diagonal
    return HeadWeights(feature_map, meta(d), 0.0, meta(n * (n + 1) // 2, 128, 128, dtype=dtype), 1.0, 0.4, *apart)


def _score(weights: Any, rows: int, dtype: torch.dtype) -> None:
    from rmcore.ops.backends import triton as backend

    hidden = torch.empty(rows, weights.hidden_size, dtype=dtype, device="meta")
    backend.score(hidden, weights, torch.empty(4, rows, device="meta"))


def _heads(
    h: int, dtype: torch.dtype, members: int = 1, *, per: int = 2, softmax: bool = False, depth: int = 2, width: int = 0
) -> Any:
    from rmcore.ops import AttributeWeights

    meta: Callable[..., torch.Tensor] = functools.partial(torch.empty, device="meta")
    sizes = [h, *[width or h] * depth]
    return AttributeWeights(
        meta(members, 5 * per, h, dtype=dtype), "normal" if per == 2 else "quantiles", per,
        fixed=None if depth else meta(members, 5),
        layers=tuple(meta(members, n, k, dtype=dtype) for k, n in pairwise(sizes)),
        biases=tuple(meta(members, n) for n in sizes[1:]),
        last=meta(members, 5, sizes[-1]) if depth else None, last_bias=meta(members, 5) if depth else None,
        softmax=softmax, scale=meta(members) if softmax else None,
    )  # fmt: skip


def _score_attributes(heads: Any, rows: int, dtype: torch.dtype, *, prompts: bool = False) -> None:
    from rmcore.ops.backends import triton as backend

    hidden = torch.empty(rows, heads.hidden_size, dtype=dtype, device="meta")
    backend.score_attributes(hidden, heads, torch.empty_like(hidden) if prompts else None)


def _accumulate(
    weights: Any, precision: torch.dtype, dtype: torch.dtype, rows: int = 8192, *, likelihood: str = "logistic",
    weighted: bool = False,
) -> None:  # fmt: skip
    from rmcore.ops.backends import triton as backend
    from rmcore.ops.tasks import AccumulateTask

    d = weights.num_features
    meta: Callable[..., torch.Tensor] = functools.partial(torch.empty, device="meta")
    hidden = meta(rows, weights.hidden_size, dtype=dtype)
    for pairs in (None, meta(rows // 2, 2, dtype=torch.int64)):
        n = rows if pairs is None else rows // 2
        backend.accumulate(AccumulateTask(
            hidden, meta(n), weights.map, meta(d), meta(d, d, dtype=precision), meta(d, dtype=precision), pairs,
            meta(n) if weighted else None, 0.0, likelihood,  # type: ignore[arg-type]
        ))  # fmt: skip


def _pair_variance(weights: Any, dtype: torch.dtype, counts: tuple[int, ...], k: int = 8) -> None:
    from rmcore.ops.backends import triton as backend

    several = torch.tensor([3, 2, 3])  # listed rows
    backend.pair_variance(torch.empty(8, weights.hidden_size, dtype=dtype, device="meta"), several, weights)
    for groups in counts:
        hidden = torch.empty(groups * k, weights.hidden_size, dtype=dtype, device="meta")
        backend.pair_variance(hidden, torch.full((groups,), k), weights)


def _power(h: int, dtype: torch.dtype, rows: int = 4096) -> None:
    from rmcore.ops.backends import triton as backend

    backend.power_iteration(torch.empty(rows, h, dtype=dtype, device="meta"), torch.empty(h, device="meta"), 2)


# -- compiling instead of launching -----------------------------------------------------------------------------------


class _Driver:
    """As much of a Triton driver as compiling asks for: device number = compute capability."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compiling(arch: int) -> Iterator[dict[str, Build]]:
    """Compile for ``arch`` whatever is launched inside; the builds, by Triton's hash, appear in the yielded dict."""
    import triton
    from triton.runtime.jit import JITFunction

    from rmcore.kernels import common

    builds: dict[str, Build] = {}
    known: dict[str, Build] = {}
    driver, run = _Driver(arch), JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash not in known:
            constants = " ".join(f"{k}={v}" for k, v in kwargs.items() if k.isupper())
            known[compiled.hash] = _assemble(arch, self.fn.__name__, constants, compiled)
        builds[compiled.hash] = known[compiled.hash]
        return compiled

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    JITFunction.run = compile_only
    common.DIRECT[0] = False
    try:
        yield builds
    finally:
        common.DIRECT[0] = True
        JITFunction.run = run
        triton.runtime.driver._active = before


def compile_all(arch: int, quick: bool, share: int = 0, shares: int = 1, int8: bool = False) -> list[Build]:
    """Compile what the ``share``-th part of the calls launch on ``arch``; with ``int8``, of int8 heads alone."""
    from rmcore.kernels.heuristics import Device
    from rmcore.ops.backends import triton as backend

    backend._device = lambda device: Device(KIND[arch], MULTIPROCESSORS[arch])  # type: ignore[assignment]
    with compiling(arch) as builds:
        wanted = _int8_calls(arch, (16, 128, 8192) if quick else (), quick) if int8 else calls(arch, quick)
        for number, call in enumerate(wanted):
            if number % shares == share:
                call()
    return list(builds.values())


def _assemble(arch: int, name: str, constants: str, compiled: Any) -> Build:
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    ptx: str = compiled.asm["ptx"]
    kept = Path(knobs.cache.dir) / f"rmcore-ptxas-{hashlib.sha256(ptx.encode()).hexdigest()[:32]}.txt"
    if not kept.exists():
        target = re.search(r"^\.target\s+(\S+?)(,|$)", ptx, re.MULTILINE)
        assert target is not None, name
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(ptx)
            file.flush()
            command = [get_ptxas(arch).path, "-v", f"--gpu-name={target[1]}", file.name, "-o", "/dev/null"]
            log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(log)
    log = kept.read_text()
    registers = re.search(r"Used (\d+) registers", log)
    assert registers is not None, log
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    m = compiled.metadata
    units = {"wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma"}
    unit = next((name for instruction, name in units.items() if instruction in ptx), "")
    unit += " s8" if re.search(r"mma\.\S*(?:\.s32\.s8\.s8|kind::i8)", ptx) else ""
    # ptxas says so where Hopper's matrix instructions cannot run beside others, which costs a large part of the speed.
    serialized = "wgmma.mma_async instructions are serialized" in log
    halves = {compiled.src.signature.get(operand) for operand in ("phi", "weight", "factor")} & {
        "*fp16",
        "*bf16",
        "*i8",
    }
    large = re.search(r"\bBM=(\d+)", constants)
    plain = arch == 90 and bool(halves) and large is not None and int(large[1]) >= 64 and not unit.startswith("wgmma")
    plain = plain and name != "weigh_kernel"  # takes no product
    widened = name.endswith("int8_kernel") and "BK=" in constants and not unit.endswith(" s8")
    counts = "atom.global" in ptx
    return Build(
        arch, name, constants, m.num_warps, m.num_stages, int(registers[1]), m.shared, spills, unit, serialized,
        "griddepcontrol.wait" in ptx, plain, widened, counts, counts and not _counts_after_stores(ptx),
        compile_tma.descriptor_loads(ptx), compile_tma.torn(compiled.asm["ttgir"]),
    )  # fmt: skip


def _counts_after_stores(ptx: str) -> bool:
    """Whether a barrier lies between every count and the stores before it, and between it and the loads after it."""
    kinds = {"st.global": "store", "ld.global": "load", "atom.global": "count", "bar.sync": "barrier"}
    found = [next((kind for start, kind in kinds.items() if start in line), "") for line in ptx.splitlines()]
    seen = [kind for kind in found if kind]
    places = [place for place, kind in enumerate(seen) if kind == "count"]

    def first(kinds: list[str], wanted: str) -> bool:
        return next((kind for kind in kinds if kind in (wanted, "barrier")), "barrier") == "barrier"

    return all(first(seen[:place][::-1], "store") and first(seen[place + 1 :], "load") for place in places)


def allowed_spills(arch: int, kernel: str) -> tuple[int, ...]:
    """Of :data:`ALLOWED_SPILLS`, with the Triton that is installed."""
    import triton

    return ALLOWED_SPILLS.get((".".join(triton.__version__.split(".")[:2]), arch, kernel), ())


def not_spilled(builds: list[Build]) -> list[str]:
    """Allowances that have no use any more, in words; ``builds`` are all there are of their architectures."""
    found = []
    for arch, kernel in sorted({(build.arch, build.kernel) for build in builds}):
        spilled = {b.spills for b in builds if (b.arch, b.kernel) == (arch, kernel)}
        found += [
            f"{kernel} on {arch}: {bytes_} bytes are allowed to spill and do not"
            for bytes_ in allowed_spills(arch, kernel)
            if bytes_ not in spilled
        ]
    return found


def faults(build: Build) -> list[str]:
    """What is wrong with a build, in words."""
    found = []
    if build.spills and build.spills not in allowed_spills(build.arch, build.kernel):
        found.append(f"{build.spills} bytes spilled")
    if build.shared > SHARED_LIMIT[build.arch]:
        found.append(f"{build.shared} bytes of shared memory of {SHARED_LIMIT[build.arch]}")
    if build.serialized:
        found.append("serialized wgmma")
    if build.plain:
        found.append("no wgmma though its tiles are large enough")
    if build.widened:
        found.append("whole numbers not multiplied as bytes")
    if build.early:
        found.append("counts itself before it has stored, or reads before it has counted")
    if build.torn:
        found.append("a box of another size than where it is copied to")
    if bool(build.boxes) != (build.kernel in DESCRIBED):
        found.append("loads by descriptor" if build.boxes else "no loads by descriptor")
    if build.waits != ("PDL=True" in build.constants):
        found.append("starts early and does not wait" if not build.waits else "waits for nothing")
    return found


def table(builds: list[Build]) -> str:
    """The builds, one a line."""
    names = f"{'arch':>4} {'kernel':<18} {'warps':>5} {'stages':>6} {'regs':>4} {'shared':>7} {'spills':>6}"
    lines = [f"{names} {'unit':<8} constants"]
    for b in sorted(builds):
        wrong = "  <-- " + ", ".join(faults(b)) if faults(b) else ""
        lines.append(
            f"{b.arch:>4} {b.kernel:<18} {b.warps:>5} {b.stages:>6} {b.registers:>4} {b.shared:>7} {b.spills:>6} "
            f"{b.unit:<8} {b.constants}{wrong}"
        )
    return "\n".join(lines)


def compile_archs(archs: list[int], quick: bool, workers: int, int8: Sequence[int] = ()) -> list[Build]:
    """All builds for all ``archs``, and those of int8 heads for further ones, in ``workers`` processes."""
    wanted = [(arch, False) for arch in archs] + [(arch, True) for arch in int8 if arch not in archs]
    if workers <= 1:
        return [build for arch, only in wanted for build in compile_all(arch, quick, int8=only)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(compile_all, arch, quick, share, workers, only)
            for arch, only in wanted
            for share in range(workers)
        ]
        return sorted({build for job in jobs for build in job.result()})


def main() -> int:
    """Print the table; the exit status says whether every build is sound."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the ends of the tables only")
    parser.add_argument("--archs", type=int, nargs="+", default=[80, 90, 100], choices=sorted(KIND))
    parser.add_argument(
        "--int8", type=int, nargs="+", default=[], choices=sorted(KIND), help="int8 heads alone, for these"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the builds here too")
    arguments = parser.parse_args()
    builds = compile_archs(arguments.archs, arguments.quick, arguments.workers, arguments.int8)
    print(table(builds))
    if arguments.json:
        arguments.json.write_text(json.dumps([b._asdict() for b in builds], indent=1))
    bad = [b for b in builds if faults(b)]
    stale = [] if arguments.quick else not_spilled([b for b in builds if b.arch in arguments.archs])
    import triton

    print("\n".join([*stale, f"Triton {triton.__version__}: {len(builds)} builds, {len(bad)} unsound"]))
    return 1 if bad or stale else 0


if __name__ == "__main__":
    sys.exit(main())
