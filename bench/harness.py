"""Honest timing: cold weights, random data, medians with quantiles, limits measured in the same run.

Every timed variant gets several copies of its weights and calls rotate over them, so that no call finds its weights in
the last-level cache (folded weights of h = D = 4096 nearly fit an H200's L2, and a warm loop would flatter). On a GPU
the rotation is captured in one CUDA graph and replayed; variants that cannot be captured are timed with events.

On a shared machine memory is now slow and now fast. Its limit is the most that was seen in a run, asked again after
every row (:class:`ReadRate`), and rows are held against that in the end: asked once, at the start, rows measured later
passed it. What is to be compared takes turns, call by call (:func:`time_in_turns`), reading memory among it.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmcore._base.quantile import quantiles

__all__ = [
    "ISA_VARIABLES",
    "Call",
    "Floor",
    "Limits",
    "ReadRate",
    "Timing",
    "cache_bytes",
    "compile_apart",
    "environment",
    "left_out",
    "measure_limits",
    "rotations",
    "synchronize",
    "time_calls",
    "time_in_turns",
]

Call = Callable[[], object]

ISA_VARIABLES = ("RMCORE_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Environment variables that hold us, torch, oneDNN and MKL to an instruction set, read when each is first used."""

SLOWEST_CALL_S = 3.0
"""A variant whose one call takes longer is not timed: it would take minutes, mostly in emulation."""


def compile_apart() -> None:
    """Let torch.compile keep what it compiles for this instruction set apart from what it compiles for others.

    Inductor's cache of graphs (torch 2.13) knows nothing of ``ATEN_CPU_CAPABILITY``: a loop written for 8 floats a step
    would be compiled for 16 and write past its output, in this run or in whatever else on the machine finds it there.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{default_cache_dir()}-rmcore-{torch.backends.cpu.get_cpu_capability()}"


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 10% and 90% quantiles over ``samples`` samples of ``calls`` calls each."""

    median: float
    low: float
    high: float
    samples: int
    calls: int
    method: str


@dataclass(frozen=True)
class Floor:
    """The least seconds of some work: what moving its bytes takes by the limits, and what its arithmetic takes."""

    memory_s: float
    arithmetic_s: float

    @property
    def seconds(self) -> float:
        """Both at once."""
        return max(self.memory_s, self.arithmetic_s)

    def beside(self, seconds: float) -> dict[str, float]:
        """What a row that took ``seconds`` says of its limit."""
        return {"floor_s": self.seconds, **asdict(self), "of_limit": self.seconds / seconds}


@dataclass(frozen=True)
class Limits:
    """What this machine can do, measured just now: bytes/s, and operations/s of multiply-adds by dtype."""

    bandwidth: float
    bandwidth_kind: str
    matrix: dict[str, float] = field(default_factory=dict)
    matrix_kind: str = "a large product"

    def floor(self, nbytes: float, flop: float, dtype: str) -> Floor:
        """The least seconds for moving ``nbytes`` and computing ``flop`` in ``dtype``."""
        rate = self.matrix.get(dtype) or max(self.matrix.values())
        return Floor(nbytes / self.bandwidth, flop / rate)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def cache_bytes(device: torch.device) -> int:
    """Bytes of the last-level cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[text[-1]])
    return max(sizes, default=32 << 20)


def cold_bytes(device: torch.device) -> int:
    """How many bytes a rotation walks through.

    A last-level cache of a CPU need not evict what is oldest, and then keeps a part of any cyclic walk: of 3 copies of
    50 MB, 32 MB may be there, a fifth; of 16 times the cache, a sixteenth at most. Of large caches less than 16 times:
    1 GB is walked through, or twice the cache.
    """
    cache = cache_bytes(device)
    return 2 * cache if device.type == "cuda" else max(2 * cache, min(16 * cache, 1 << 30))


def rotations(nbytes: int, device: torch.device, limit: int = 256) -> int:
    """How many copies of ``nbytes`` a rotation needs so that each is out of the cache when its turn comes again."""
    return min(limit, max(1, math.ceil(cold_bytes(device) / max(nbytes, 1)) + 1))


def time_calls(calls: Sequence[Call], device: torch.device, *, budget_s: float = 1.0, min_samples: int = 7) -> Timing:
    """Time ``calls``, one per weight copy, in rotation, for about ``budget_s`` seconds."""
    for call in calls:
        call()
    synchronize(device)
    return (
        _time_cuda(calls, device, budget_s, min_samples)
        if device.type == "cuda"
        else _time_cpu(calls, budget_s, min_samples)
    )


def time_in_turns(variants: Sequence[Sequence[Call]], *, budget_s: float = 1.0, min_samples: int = 7) -> list[Timing]:
    """Time variants on a CPU for about ``budget_s`` seconds each: one call of each in turn, over its rotating copies.

    Each sees as much as the others of a machine that is now slow and now fast, so that their ratios hold.
    """
    for call in (call for calls in variants for call in calls):
        call()
    samples: list[list[float]] = [[] for _ in variants]
    end = time.perf_counter() + budget_s * len(variants)
    count = 0
    while count < min_samples or (time.perf_counter() < end and count < 2000):
        for taken, calls in zip(samples, variants, strict=True):
            started = time.perf_counter()
            calls[count % len(calls)]()
            taken.append(time.perf_counter() - started)
        count += 1
    return [_timing(taken, 1, "perf_counter, rotating copies, in turns") for taken in samples]


def left_out(call: Call, device: torch.device) -> str | None:
    """Calls once; why there is no sense in timing it, or None."""
    started = time.perf_counter()
    call()
    synchronize(device)
    seconds = time.perf_counter() - started
    return f"one call took {seconds:.1f} s" if seconds > SLOWEST_CALL_S else None


def _time_cpu(calls: Sequence[Call], budget_s: float, min_samples: int) -> Timing:
    return _timing(_samples_cpu(calls, budget_s, min_samples), 1, "perf_counter, rotating copies")


def _samples_cpu(calls: Sequence[Call], budget_s: float, min_samples: int) -> list[float]:
    samples: list[float] = []
    end = time.perf_counter() + budget_s
    while len(samples) < min_samples or (time.perf_counter() < end and len(samples) < 2000):
        call = calls[len(samples) % len(calls)]
        started = time.perf_counter()
        call()
        samples.append(time.perf_counter() - started)
        if len(samples) >= 3 and time.perf_counter() > end + 4 * budget_s:
            break
    return samples


def _time_cuda(calls: Sequence[Call], device: torch.device, budget_s: float, min_samples: int) -> Timing:
    method = "CUDA graph of one rotation, events"
    try:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        run: Call = graph.replay
    except (RuntimeError, torch.cuda.CudaError) as error:
        torch.cuda.synchronize(device)
        method = f"events without a graph ({str(error).splitlines()[0][:80]})"

        def run() -> None:
            for call in calls:
                call()

    run()
    samples: list[float] = []
    started = time.perf_counter()
    while len(samples) < min_samples or (time.perf_counter() - started < budget_s and len(samples) < 500):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return _timing(samples, len(calls), method)


def _timing(samples: list[float], calls: int, method: str) -> Timing:
    low, median, high = quantiles(samples, (0.1, 0.5, 0.9))
    return Timing(median, low, high, len(samples), calls, method)


def measure_limits(device: torch.device, *, quick: bool = False, reads: ReadRate | None = None) -> Limits:
    """Bandwidth (GPU: device-to-device copy, read + write; CPU: read by all threads) and multiply-add rate by dtype.

    ``reads`` is what goes on measuring a CPU's memory afterwards.

    On a CPU both come from loops of our own (``csrc/cpu/read_rate.cpp``, ``multiply_all.cpp``), for the instruction set
    the kernels run with: what torch gets may be an emulation, thousands of times slower than the machine.
    """
    if device.type == "cpu":
        return _cpu_limits(quick, reads)
    size = 1 << (28 if quick else 30)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = time_calls([lambda: target.copy_(source)], device, budget_s=0.3).low
    matrix, n = {}, 8192
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.items():
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        taken = time_calls([lambda a=a, b=b: a @ b], device, budget_s=0.3, min_samples=5).low  # type: ignore[misc]
        matrix[name] = 2 * n**3 / taken
    return Limits(2 * size / seconds, "copy, read + write", matrix, f"torch's product of {n} × {n} matrices")


def _cpu_limits(quick: bool, reads: ReadRate | None) -> Limits:
    try:
        from rmcore import _cpu
    except ImportError:  # no kernels of ours either: torch's float32 is what can be asked for
        size, n = 1 << 28, 1024 if quick else 2048
        data, a = torch.randn(size // 4), torch.randn(n, n)
        read, product = _least_s(data.sum), _least_s(lambda: a @ a)
        return Limits(size / read, "torch's sum", {"float32": 2 * n**3 / product}, "torch's float32 product")
    threads, rounds, matrix = torch.get_num_threads(), 50_000, {}
    reads = reads or ReadRate()
    bandwidth = reads.again(1.0)
    for name in ("float32", "bfloat16", "float16", "int8"):
        operations = _cpu.multiply_all(name, rounds, threads)  # the same at every call
        matrix[name] = operations / _least_s(partial(_cpu.multiply_all, name, rounds, threads))
    told = f"multiply-adds on registers, {_cpu.isa()}"
    kind = f"read by all threads, {reads.streams} streams each, the most in this run"
    return Limits(bandwidth, kind, matrix, told)


class ReadRate:
    """Bytes a second that all threads read together, in a loop of our own (csrc/cpu/read_rate.cpp): the most so far.

    Others on the machine only ever take from it. Pieces of 64 MB are read in turn, of as much as a rotation of weights
    has, so that both find the cache alike; short calls are not all disturbed by others. From how many places at a time
    a thread should read, and how far ahead it should ask, is tried first: on an AVX2 machine four places gave 8 to 40%
    more than one. Needs ``rmcore._cpu``.

    Attributes:
        streams: places that a thread reads from at a time.
        ahead: bytes ahead of each that it asks for.
        calls: what reads so, a piece each.
        part: bytes of a piece.
    """

    STREAMS = (1, 2, 4)
    AHEAD = (2048, 8192)

    def __init__(self) -> None:
        from rmcore import _cpu

        page, part = 2 << 20, 64 << 20
        pieces = max(4, math.ceil(cold_bytes(torch.device("cpu")) / part))
        self._memory = torch.zeros(pieces * part + page, dtype=torch.uint8)
        start = self._memory.data_ptr() + -self._memory.data_ptr() % page
        _cpu.advise_huge(start, pieces * part)
        self._memory.fill_(1)
        self.part, self._most, threads = part, 0.0, torch.get_num_threads()
        ways: dict[tuple[int, int], list[Call]] = {}
        for streams, ahead in itertools.product(self.STREAMS, self.AHEAD):
            # Never the piece that another way has just left in the cache.
            order = [(2 * len(ways) + i) % pieces for i in range(pieces)]
            read = partial(_cpu.read_all, bytes=part, threads=threads, streams=streams, ahead=ahead)
            ways[streams, ahead] = [partial(read, start + i * part) for i in order]
        timings = zip(ways, time_in_turns(list(ways.values()), budget_s=0.25), strict=True)
        self.streams, self.ahead = min(timings, key=lambda way: way[1].median)[0]
        self.calls = ways[self.streams, self.ahead]

    def again(self, budget_s: float = 0.1) -> float:
        """Measure for ``budget_s`` seconds; the most there was, now or earlier."""
        self._most = max(self._most, self.part / min(_samples_cpu(self.calls, budget_s, 20)))
        return self._most


def _least_s(*calls: Call) -> float:
    return min(_samples_cpu(calls, 1.0, 50))


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, date and commit, for the results file."""
    import rmcore

    versions = {"torch": torch.__version__, "rmcore": rmcore.__version__, "python": platform.python_version()}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    told: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": versions,
        "device": device.type,
        "cache_bytes": cache_bytes(device),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        told |= {"name": properties.name, "sms": properties.multi_processor_count, "cuda": torch.version.cuda}
    else:
        told |= {"name": _cpu_name(), "cores": os.cpu_count(), "isa": torch.backends.cpu.get_cpu_capability()}
        told |= {"kernels_isa": _kernels_isa(), "load": os.getloadavg()[0]}
        told |= {"held_to": {name: os.environ[name] for name in ISA_VARIABLES if name in os.environ}}
    return told


def _kernels_isa() -> str:
    try:
        from rmcore import _cpu
    except ImportError:
        return "none"
    return str(_cpu.isa())


def _commit() -> str:
    here = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or os.environ.get("RMCORE_COMMIT", "unknown")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Largest |got − truth| over the largest |truth|, NaN counting as infinite."""
    error = (got.double() - truth.double()).abs().max() / truth.double().abs().max().clamp_min(1e-300)
    return float(torch.nan_to_num(error, nan=math.inf))


def as_dict(value: Any) -> dict[str, Any]:
    """A dataclass as JSON values."""
    return asdict(value)
