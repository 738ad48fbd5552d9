"""First contact with a GPU that cannot come back empty: ``make gpu-check``, and ``make gpu-check-more`` for the rest.

    python bench/gpu_check.py prepare     here, without a GPU: build _cuda for the Python of the GPU machine, to carry
    python bench/gpu_check.py run         the first part: environment, limits, right or wrong, headline timings, tests
    python bench/gpu_check.py more        the second: profiles, tuning, sanitizers, other sizes and dtypes, encode
    python bench/gpu_check.py report FILE turn the rows into bench/results/gpu-<card>.json and print the table

Needs torch, triton and (only if no ``_cuda`` was carried) nvcc, cmake, ninja and pybind11; installs nothing. A script
of the standard library alone: it must run where nothing of rmcore works.

Two files hold all that is found, in ``$OUT`` or ``out/gpu-check``: ``rows.jsonl``, one fact a line, on disk as soon as
it is known, and ``log.txt``, what the steps printed. Every step is a process group of its own with a limit of its own:
at the limit it gets SIGINT so that it can report, five seconds later the whole group is killed. A step that fails takes
only its backend out of the timings, never the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PREPARED = ROOT / "out" / "gpu-check-prepared"
GRACE_S = 5.0
GLIBC = (2, 34)
"""Newest C library symbols that the GPU machine has."""
GPU_TESTS = ("cuda", "triton", "cuda_int8", "triton_int8")
NCU = (
    "ncu", "--clock-control", "none", "--target-processes", "all", "--section", "SpeedOfLight",
    "--section", "MemoryWorkloadAnalysis", "--section", "WarpStateStats", "--section", "LaunchStats",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A command with a limit: its failure ``disqualifies`` a backend, or it ``needs`` one that is not."""

    name: str
    limit_s: float
    command: tuple[str, ...]
    disqualifies: str = ""
    needs: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def _probe(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "rmcore.bench.gpu_probe", *arguments)


def _pytest(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def first_part(device: str, size: int) -> list[Step]:
    """What decides most comes first: is it right, which way is faster, how fast is it; then every shape."""
    common = ("--device", device)
    small, large = ("--size", str(min(size, 1024))), ("--size", str(size))
    steps = [Step("card", 30, _probe("card", *common))]
    backends = ("cuda", "triton") if device == "cuda" else ("cpu", "torch")
    steps += [
        Step(f"smoke-{name}", 40, _probe("smoke", *common, *small, "--backends", name), disqualifies=name)
        for name in backends
    ]
    if device == "cuda":
        compared = ("--forms", "streamed", "tail", "pairs")
        steps.append(Step("forms", 55, _probe("forms", *common, *large, *compared), needs="triton"))
    for what, limit_s in (("score", 40), ("other", 40)):
        for name in backends:
            command = _probe(what, *common, *large, "--backends", name)
            steps.append(Step(f"{what}-{name}", limit_s, command, needs=name))
    for name in backends if device == "cuda" else backends[:1]:  # int8 beside fp16: the same cases
        whole = (*common, "--dtype", "int8", "--backends", name)
        steps += [
            Step(f"smoke-int8-{name}", 25, _probe("smoke", *small, *whole), disqualifies=f"{name} int8", needs=name),
            Step(f"score-int8-{name}", 30, _probe("score", *large, *whole), needs=f"{name} int8"),
        ]
    if device == "cuda":
        tune = ("--kernels", "project", "product", "--rows", "64", "1", "512", "--limit", "16")
        tests = ("-n", "8", "--timeout", "60", "--maxfail", "25")
        steps += [
            Step("eager", 30, _probe("eager", *common)),
            Step(
                "tests-kernels", 75,
                _pytest(*tests, *(f"tests/gpu/test_{name}_gpu.py" for name in GPU_TESTS)),
            ),
            Step("tune", 60, (sys.executable, "tests/gpu/tune_triton.py", *tune)),
        ]  # fmt: skip
    return steps


def second_part(device: str, size: int) -> list[Step]:
    """What is worth knowing once the first part is home."""
    common = ("--device", device)
    if device != "cuda":
        return [Step("float32", 40, _probe("score", *common, "--size", str(size), "--dtype", "float32"))]
    kernels = "regex:score_kernel|project_kernel|column|piece|square_kernel|product_kernel|pair_kernel|centre_kernel"
    smoke = _probe("smoke", "--repeats", "0", "--rows", "1", "64", "256", "4096")
    sanitized = _pytest("-k", "sanitizer", "tests/gpu/test_cuda_gpu.py", "tests/gpu/test_cuda_int8_gpu.py")
    tune = ("--kernels", "gram", "project", "product", "--rows", "16384", "16", "256", "1024", "--limit", "24")
    encode = ("--suite", "encode", "--group", "8", "--lengths", "512+512", "--layers", "8", "--rounds", "1")
    return [
        Step("ncu", 70, (*NCU, "-k", kernels, "-c", "24", *smoke)),
        Step("versus", 70, _probe("versus", *common, "--size", str(size))),
        Step("tune", 100, (sys.executable, "tests/gpu/tune_triton.py", *tune)),
        Step("tiles", 30, _probe("tiles", *common, "--size", str(size))),
        Step("forms-launch", 30, _probe("forms", *common, "--size", str(size), "--forms", "launch")),
        Step("size-8192", 50, _probe("score", "--size", "8192", "--rows", "1", "16", "64", "256", "4096")),
        Step("size-1024", 30, _probe("score", "--size", "1024", "--rows", "1", "16", "64", "256", "4096")),
        Step("size-128", 20, _probe("score", "--size", "128", "--rows", "1", "16")),  # what a launch costs by itself
        Step("bfloat16", 40, _probe("score", "--dtype", "bfloat16", "--rows", "1", "64", "1024")),
        Step("memcheck", 60, ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *sanitized)),
        Step("racecheck", 60, ("compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9", *sanitized)),
        Step("encode", 60, (sys.executable, "-m", "rmcore.bench", "--device", "cuda", *encode, "--verbose")),
        Step("tests-packing", 60, _pytest("-n", "4", "--timeout", "60", "tests/gpu/test_packing_gpu.py")),
    ]


# -- running ---------------------------------------------------------------------------------------------------------


class Run:
    """The two files of a run, and the tree its steps import."""

    def __init__(self, out: Path, total_s: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.rows, self.log = out / "rows.jsonl", out / "log.txt"
        self.ends = time.monotonic() + total_s
        self.out_of_the_running: set[str] = set()
        self.failed: list[str] = []

    def write(self, **row: Any) -> None:
        """A row of the runner's own, on disk when this returns."""
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def step(self, step: Step, tree: Path) -> None:
        """Run one step to its end or its limit, and note what came of it."""
        left = self.ends - time.monotonic()
        if step.needs in self.out_of_the_running:
            self.write(step=step.name, skipped=f"{step.needs} failed its smoke test")
            return
        if left < 10:
            self.write(step=step.name, skipped="no time left")
            return
        began = time.monotonic()
        rows_before = self.rows.stat().st_size if self.rows.exists() else 0
        print(f"[{step.name}] ...", flush=True)
        code = self._process(step, tree, min(step.limit_s, left - GRACE_S))
        seconds = round(time.monotonic() - began, 1)
        self.write(step=step.name, rc=code, seconds=seconds)
        print(f"[{step.name}] rc={code} {seconds} s", flush=True)
        if code:
            self.failed.append(step.name)
            print(self._tail(), flush=True)
        if step.disqualifies and (code or not _all_right(self.rows, rows_before)):
            self.out_of_the_running.add(step.disqualifies)
            self.write(step=step.name, disqualified=step.disqualifies)

    def _process(self, step: Step, tree: Path, limit_s: float) -> int:
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(tree),
            "RMCORE_GPU_ROWS": str(self.rows),
            "OUT": str(self.rows.parent),
            "RMCORE_COMMIT": _commit(),
            "RMCORE_SELF_CHECK": "0",  # the steps are the check
            **step.environment,
        }
        with self.log.open("ab") as log:
            log.write(f"=== {step.name}: {' '.join(step.command)}\n".encode())
            log.flush()
            try:
                process = subprocess.Popen(
                    step.command, cwd=tree, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                log.write(f"{error}\n".encode())
                return 127
            code = 124
            try:
                code = process.wait(timeout=max(1.0, limit_s))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGINT)  # so that it reports what it has
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=GRACE_S)
            finally:
                with suppress(ProcessLookupError):  # children too: a sanitizer's, pytest's workers
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return code

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-8:]
        return "\n".join("    " + line[:200] for line in lines)


def _all_right(rows: Path, start: int) -> bool:
    """Whether the rows after byte ``start`` hold at least one result, and no failed, non-finite or unstable one."""
    with rows.open("rb") as file:
        file.seek(start)
        found = [json.loads(line) for line in file]
    cases = [row for row in found if "err_g" in row]
    within = all(c["err_g"] < LIMITS["err_g"] and c["err_v"] < LIMITS["err_v"] for c in cases)
    right = within and all(c["finite"] and c["bits_repeat"] for c in cases)
    return bool(cases) and right and not any("failed" in row for row in found)


def assemble(tree: Path) -> None:
    """rmcore as an installation would have it: packages, kernels, bench, and the carried ``_cuda``; tests beside it."""
    skip = shutil.ignore_patterns("__pycache__", "*.so", "results", "kernels", "bench", "examples")
    shutil.copytree(ROOT / "rmcore", tree / "rmcore", ignore=skip)
    plain = shutil.ignore_patterns("__pycache__", "results")
    for name in ("kernels", "bench", "examples"):
        shutil.copytree(ROOT / name, tree / "rmcore" / name, ignore=plain)
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=plain)
    shutil.copytree(ROOT / "csrc", tree / "csrc", ignore=plain)
    shutil.copy(ROOT / "pyproject.toml", tree)
    for path in PREPARED.glob("*.so"):
        shutil.copy(path, tree / "rmcore")


def _commit() -> str:
    """Of the checkout; on a machine that got the files without git, of the folder that was prepared."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    with suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    noted = PREPARED / "COMMIT"
    return noted.read_text().strip() if noted.is_file() else "unknown"


def _extension_loads(tree: Path) -> bool:
    code = "import rmcore._cuda as c; print(c.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, check=False)
    return done.returncode == 0


def _architecture() -> str:
    code = "import torch; major, minor = torch.cuda.get_device_capability(); print(major * 10 + minor)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    number = done.stdout.strip()
    return {"90": "90a-real", "100": "100a-real"}.get(number, f"{number}-real" if number else "90a-real")


def build_command(build: Path, python: str, architecture: str, pybind11: str) -> list[list[str]]:
    """cmake's configure and build of ``_cuda`` alone, for one Python and one architecture."""
    configure = [
        "cmake", "-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
        "-DRMCORE_CPU=OFF", "-DRMCORE_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architecture}",
        f"-DPython_EXECUTABLE={python}", f"-Dpybind11_DIR={pybind11}",
    ]  # fmt: skip
    return [configure, ["cmake", "--build", str(build)]]


def _pybind11_folder() -> str:
    code = "import pybind11; print(pybind11.get_cmake_dir())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


def prepare(python: str, architecture: str = "90a-real") -> int:
    """Build ``_cuda`` for ``python`` (that of the GPU machine) into out/gpu-check-prepared; 0 if it can travel."""
    asked = "import sys, sysconfig; print(sys.executable, sysconfig.get_config_var('EXT_SUFFIX'))"
    done = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"--python {python}: does not run ({done.stderr.strip()[:200]}); name the Python of the GPU machine")
        return 1
    interpreter, suffix = done.stdout.split()  # the interpreter itself, where ``python`` is a launcher
    PREPARED.mkdir(parents=True, exist_ok=True)
    for old in PREPARED.glob("*.so"):
        old.unlink()
    build = PREPARED / "build"
    for command in build_command(build, interpreter, architecture, _pybind11_folder()):
        subprocess.run(command, check=True)
    (built,) = build.rglob("_cuda*.so")
    if not built.name.endswith(suffix):
        print(f"{built.name} was built for another Python than {interpreter}, whose modules end in {suffix}")
        return 1
    needed = newest_glibc(built)
    if needed > GLIBC:
        print(f"{built.name} needs glibc {needed[0]}.{needed[1]}, newer than {GLIBC[0]}.{GLIBC[1]}: it would not load")
        return 1
    target = PREPARED / built.name
    shutil.copy(built, target)
    shutil.rmtree(build)
    (PREPARED / "COMMIT").write_text(_commit() + "\n")
    print(f"{target} ({target.stat().st_size >> 10} KiB, glibc {needed[0]}.{needed[1]}): carry {PREPARED}")
    return 0


def newest_glibc(library: Path) -> tuple[int, int]:
    """The newest ``GLIBC_x.y`` among the versions that a library asks for."""
    data = library.read_bytes()
    found = {(0, 0)}
    for part in data.split(b"GLIBC_")[1:]:
        digits = part.split(b"\0", 1)[0].decode("ascii", "replace").split(".")
        if len(digits) >= 2 and digits[0].isdigit() and digits[1].isdigit():
            found.add((int(digits[0]), int(digits[1])))
    return max(found)


def run(steps: Sequence[Step], out: Path, total_s: float) -> int:
    """Assemble the tree, make sure of ``_cuda``, run the steps, print the table; 0 only if every step passed."""
    check = Run(out, total_s)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        tree = Path(folder)
        assemble(tree)
        cuda = any("cuda" in step.command for step in steps)
        if cuda and not _extension_loads(tree):
            check.write(step="extension", carried=False)
            build = tree / "build"
            for k, command in enumerate(build_command(build, sys.executable, _architecture(), _pybind11_folder())):
                check.step(Step(f"build-{k}", 180, tuple(command)), tree)
            for path in build.rglob("_cuda*.so"):
                shutil.copy(path, tree / "rmcore")
        for step in steps:
            check.step(step, tree)
    report(check.rows, None)
    return int(bool(check.failed))


# -- what a person reads ---------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a file; a last line that was being written when the process was killed is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def report(path: Path, results: Path | None, table: Path | None = None) -> int:
    """Print the rows as a table; with ``results`` write ``gpu-<card>.json`` there and update ``table``."""
    rows = read_rows(path)
    shown = (
        "us",
        "GBs",
        "TFLOPs",
        "eager_host_us",
        "host_us",
        "err_g",
        "err_v",
        "err",
        "bits_repeat",
        "declined",
        "failed",
    )
    for row in rows:
        if "case" in row:
            figures = " ".join(
                f"{name}={row[name]:.3g}" if isinstance(row[name], float) else f"{name}={str(row[name])[:80]}"
                for name in shown
                if name in row
            )
            print(f"{row['size']:5} {row['dtype']:8} {row['case'][:36]:36} B={row.get('rows', '-')!s:>6} {figures}")
    for row in rows:
        if "rc" in row or "skipped" in row:
            print(f"{row['step']:14} " + (f"rc={row['rc']} {row['seconds']} s" if "rc" in row else row["skipped"]))
    print("\n".join(choices(rows)))
    if results is None:
        return 0
    environment = next((row for row in rows if row.get("case") == "environment" and "name" in row), None)
    if environment is None:
        print(f"{path}: no environment row, so nobody knows which card these are of", file=sys.stderr)
        return 1
    card = "".join(c if c.isalnum() else "-" for c in environment["name"].lower()).strip("-")
    target = results / f"gpu-{card}.json"
    earlier = _not_repeated(target, rows)
    target.write_text(json.dumps({"environment": environment, "rows": rows, "earlier": earlier}, indent=1) + "\n")
    print(target)
    update_proven(table or ROOT / "rmcore" / "ops" / "proven.json", environment, rows)
    return 0


def _not_repeated(file: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What earlier runs on the card measured and this one did not, each row with its own date and commit."""

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(name)) for name in ("step", "case", "size", "dtype", "rows", "k", "shape"))

    if not file.is_file():
        return []
    known, again = json.loads(file.read_text(encoding="utf-8")), {key(row) for row in rows}
    of = {name: known["environment"][name] for name in ("date", "commit")}
    before = [of | row for row in known["rows"] if "case" in row] + known.get("earlier", [])
    return [row for row in before if key(row) not in again and row["case"] != "environment"]


def choices(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of every form and tile that was timed beside others, which was fastest: lines for ``kernels/heuristics.py``.

    Only of those that gave right results whose bits stayed the same. What decides stays what it is until somebody
    commits another row.
    """
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        words = str(row.get("case", "")).partition(",")[0].split(maxsplit=2)
        sound = row.get("bits_repeat") and row.get("finite", True) and "us" in row
        sound = sound and all(row.get(name, 0.0) < limit for name, limit in LIMITS.items())
        if len(words) == 3 and words[0] in ("form", "tile") and sound:
            groups.setdefault((words[0], words[1], row.get("rows", row.get("k"))), {})[words[2]] = row
    lines = []
    for (kind, name, count), found in groups.items():
        best, *others = sorted(found, key=lambda which: found[which]["us"])
        if not others:
            continue
        us = {which: f"{found[which]['us']:.1f} µs" for which in found}
        at = f"k={count}" if name == "pairs" else f"B={count}"
        line = f"{kind} {name} {at}: {best} {us[best]}, " + ", ".join(f"{which} {us[which]}" for which in others)
        if kind == "tile" and best == "named":
            line += f" -> ({count}, {found[best]['tile']}),  # measured: {us[best]}, {us['table']} with what was here"
        lines.append(line)
    return lines


OPS = ("score", "score_int8", "accumulate", "pair_variance", "power_iteration", "score_attributes")
LIMITS = {"err_g": 0.02, "err_v": 0.05, "err": 0.01, "err_diagonal": 0.02}
"""16-bit products of a thousand terms are right to a few thousandths; a wrong kernel is wrong by far more."""


def findings(environment: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row of ``rmcore/ops/proven.json`` for every operation of a backend that has at least one case with bits."""
    found = []
    digests = environment.get("sources", {})
    for backend in ("cuda", "triton"):
        for op in OPS:
            cases = [r for r in rows if str(r.get("case", "")).split()[:2] == [op, backend] and "declined" not in r]
            if not any("bits_repeat" in case for case in cases):
                continue
            right = all(
                "failed" not in case
                and case.get("finite", True)
                and all(case.get(name, 0.0) < limit for name, limit in LIMITS.items())
                for case in cases
            )
            found.append({
                "card": environment["name"], "backend": backend, "op": op,
                "triton": environment["versions"].get("triton", "") if backend == "triton" else "",
                "commit": environment["commit"], "sources": digests.get(backend, {}).get(op, ""),
                "right": right, "bits_equal": all(case.get("bits_repeat", True) for case in cases),
            })  # fmt: skip
    return found


def update_proven(table: Path, environment: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Put what a run found into the shipped table, in place of what an earlier one found of the same."""

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return row["card"], row["backend"], row["op"], row["triton"]

    known = {key(row): row for row in json.loads(table.read_text(encoding="utf-8"))} if table.exists() else {}
    known |= {key(row): row for row in findings(environment, rows)}
    ordered = [known[name] for name in sorted(known)]
    table.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    print(f"{table}: {len(ordered)} rows")


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run", "more", "report"))
    parser.add_argument("file", nargs="?", type=Path, help="report: the rows")
    parser.add_argument("--device", default="cuda", help="cpu: try the script itself, with small sizes")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--total", type=float, help="seconds in all; default 190 for run, 300 for more")
    parser.add_argument("--python", default="python3.12", help="prepare: the Python to build for")
    options = parser.parse_args(argv)
    if options.what == "prepare":
        return prepare(options.python)
    if options.what == "report":
        if options.file is None:
            parser.error("report: which file?")
        return report(options.file, ROOT / "bench" / "results")
    out = Path(os.environ.get("OUT") or ROOT / "out" / "gpu-check").resolve()
    steps = (first_part if options.what == "run" else second_part)(options.device, options.size)
    return run(steps, out, options.total or (190 if options.what == "run" else 300))


if __name__ == "__main__":
    raise SystemExit(main())
