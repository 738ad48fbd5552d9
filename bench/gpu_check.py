"""First contact with a GPU that cannot come back empty: ``make gpu-check``, and ``make gpu-check-more`` for the rest.

    python -m bench.gpu_check prepare     here, without a GPU: build _cuda for the Python of the GPU machine, to carry
    python -m bench.gpu_check run         the first part: environment, limits, right or wrong, headline timings, tests
    python -m bench.gpu_check more        the second: profiles, tuning, sanitizers, other sizes and dtypes, encode
    python -m bench.gpu_check report FILE turn the rows into bench/results/gpu-<card>.json and print the table

Called from the checkout. Needs torch, triton and (only if no ``_cuda`` was carried) nvcc, cmake, ninja and pybind11;
installs nothing. Of the standard library alone (``gpu_run``, ``gpu_build`` and ``gpu_report`` too): it must run where
nothing of rmcore works.

Two files hold all that is found, in ``$OUT`` or ``out/gpu-check``: ``rows.jsonl``, one fact a line, on disk as soon as
it is known, and ``log.txt``, what the steps printed. Every step is a process group of its own with a limit of its own:
at the limit it gets SIGINT so that it can report, five seconds later the whole group is killed. A step that fails takes
only its backend out of the timings, never the rest.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .gpu_build import ROOT, prepare
from .gpu_report import report
from .gpu_run import Step, run

__all__ = ["first_part", "main", "second_part"]

GPU_TESTS = ("cuda", "triton", "cuda_int8", "triton_int8", "cuda_mid")
"""Those of int8 heads, then those of the launch for 65 to 512 rows, last."""
NCU = (
    "ncu", "--clock-control", "none", "--target-processes", "all", "--section", "SpeedOfLight",
    "--section", "MemoryWorkloadAnalysis", "--section", "WarpStateStats", "--section", "LaunchStats",
)  # fmt: skip


def _probe(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "rmcore.bench.gpu_probe", *arguments)


def _pytest(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def first_part(device: str, size: int) -> list[Step]:
    """What decides most comes first: is it right, how fast is it, does every shape pass; then which way is faster.

    Limits are about twice what a step took on an H100, or is expected to take (docs/status.md): int8 kernels and those
    of attribute heads are compiled there for the first time, half a second each.
    """
    common = ("--device", device)
    small, large = ("--size", str(min(size, 1024))), ("--size", str(size))
    backends = ("cuda", "triton") if device == "cuda" else ("cpu", "torch")
    whole = backends if device == "cuda" else backends[:1]  # int8 beside fp16: the same cases
    int8 = ("--dtype", "int8", "--backends")
    steps = [Step("card", 40, _probe("card", *common))]
    for name in backends:
        command = _probe("smoke", *common, *small, "--backends", name)
        steps.append(Step(f"smoke-{name}", 45, command, disqualifies=name))
    for name in whole:
        command = _probe("smoke", *common, *small, *int8, name)
        steps.append(Step(f"smoke-int8-{name}", 60, command, disqualifies=f"{name} int8", needs=name))
    if device == "cuda":  # 65 to 512 rows in one launch: nothing else waits for it, and it has run nowhere
        steps.append(Step("smoke-mid", 20, _probe("smoke_mid", *common, *large), disqualifies="cuda mid", needs="cuda"))
    if device == "cuda":  # as a user's first call of each does, which no other step is
        cache = {"RMCORE_SELF_CHECK": "1", "RMCORE_CACHE": "off"}
        steps.append(Step("self-check", 75, _probe("self_check", *common, *small), environment=cache))
    for name in backends:
        command = _probe("score", *common, *large, "--backends", name)
        steps.append(Step(f"score-{name}", 40, command, needs=name))
    if device == "cuda":
        steps.append(Step("forms-mid", 25, _probe("forms", *common, *large, "--forms", "mid"), needs="cuda mid"))
    for name in whole:
        command = _probe("score", *common, *large, *int8, name)
        steps.append(Step(f"score-int8-{name}", 45, command, needs=f"{name} int8"))
    for name in backends:
        command = _probe("other", *common, *large, "--backends", name)
        steps.append(Step(f"other-{name}", 50, command, needs=name))
    if device == "cuda":
        compared = ("--forms", "streamed", "tail", "pairs")
        tune = ("--kernels", "project", "product", "--rows", "64", "1", "512", "--limit", "16")
        tests = ("-n", "12", "--timeout", "90", "--maxfail", "25")  # a test compiles all that it launches
        for step, limit_s, names, needs in (
            ("tests-int8", 110, GPU_TESTS[2:4], ""),
            ("tests-mid", 50, GPU_TESTS[4:], "cuda mid"),
            ("tests-kernels", 100, GPU_TESTS[:2], ""),
        ):
            files = [f"tests/gpu/test_{name}_gpu.py" for name in names]
            steps.append(
                Step(step, limit_s, _pytest(*tests, *files), needs=needs, environment={"OMP_NUM_THREADS": "2"})
            )
        steps += [
            Step("eager", 30, _probe("eager", *common)),
            Step("forms", 70, _probe("forms", *common, *large, *compared), needs="triton"),
            Step("tune", 60, (sys.executable, "tests/gpu/tune_triton.py", *tune)),
        ]
    return steps


def second_part(device: str, size: int) -> list[Step]:
    """What is worth knowing once the first part is home."""
    common = ("--device", device)
    if device != "cuda":
        return [Step("float32", 40, _probe("score", *common, "--size", str(size), "--dtype", "float32"))]
    kernels = "regex:^(score|stream|mid|project|column|piece|square|product|rows|int8_stream)(_int8|_score)?_kernel"
    smoke = _probe("smoke", "--repeats", "0", "--rows", "1", "64", "256", "4096")
    whole = _probe("smoke", "--repeats", "0", "--rows", "1", "64", "1024", "--dtype", "int8")
    files = [f"tests/gpu/test_{name}_gpu.py" for name in ("cuda", "cuda_int8", "cuda_mid")]
    sanitized = _pytest("-k", "sanitizer", *files)
    tune = ("--kernels", "gram", "project", "product", "--rows", "16384", "16", "256", "1024", "--limit", "18")
    encode = ("--suite", "encode", "--group", "8", "--lengths", "512+512", "--layers", "8", "--rounds", "1")
    return [
        Step("large", 75, _probe("large", *common, "--size", str(size))),
        Step("tests-large", 60, _pytest("-n", "8", "--timeout", "50", "tests/gpu/test_triton_tma_gpu.py")),
        Step("versus", 70, _probe("versus", *common, "--size", str(size))),
        Step("memcheck", 60, ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *sanitized)),
        Step("racecheck", 60, ("compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9", *sanitized)),
        Step("ncu", 60, (*NCU, "-k", kernels, "-c", "24", *smoke)),
        Step("ncu-mid", 40, (*NCU, "-k", kernels, "-c", "5", *_probe("smoke_mid", "--repeats", "0"))),
        Step("ncu-int8", 60, (*NCU, "-k", kernels, "-c", "24", *whole)),
        Step("tune", 75, (sys.executable, "tests/gpu/tune_triton.py", *tune)),
        Step("tiles", 30, _probe("tiles", *common, "--size", str(size))),
        Step("size-8192", 50, _probe("score", "--size", "8192", "--rows", "1", "16", "64", "256", "4096")),
        Step("size-1024", 30, _probe("score", "--size", "1024", "--rows", "1", "16", "64", "256", "4096")),
        Step("size-128", 20, _probe("score", "--size", "128", "--rows", "1", "16")),  # what a launch costs by itself
        Step("bfloat16", 40, _probe("score", "--dtype", "bfloat16", "--rows", "1", "64", "1024")),
        Step("encode", 60, (sys.executable, "-m", "rmcore.bench", "--device", "cuda", *encode, "--verbose")),
        Step("tests-packing", 60, _pytest("-n", "4", "--timeout", "60", "tests/gpu/test_packing_gpu.py")),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run", "more", "report"))
    parser.add_argument("file", nargs="?", type=Path, help="report: the rows")
    parser.add_argument("--device", default="cuda", help="cpu: try the script itself, with small sizes")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--total", type=float, help="seconds in all; default 420 for run, 280 for more")
    parser.add_argument("--python", default="python3.12", help="prepare: the Python to build for")
    options = parser.parse_args(argv)
    if options.total is not None and not 0 < options.total < 1e6:
        parser.error(f"argument --total: got {options.total}, expected seconds above 0")
    if options.size < 1:
        parser.error(f"argument --size: got {options.size}, expected a whole number, at least 1")
    if options.what == "prepare":
        return prepare(options.python)
    if options.what == "report":
        if options.file is None:
            parser.error("report: which file?")
        return report(options.file, ROOT / "bench" / "results")
    out = Path(os.environ.get("OUT") or ROOT / "out" / "gpu-check").resolve()
    steps = (first_part if options.what == "run" else second_part)(options.device, options.size)
    return run(steps, out, options.total or (420 if options.what == "run" else 280))


if __name__ == "__main__":
    raise SystemExit(main())
