"""One command on a bare GPU machine: build for its architecture, test, sanitize, measure. Ends inside nine minutes.

Run as a script (nothing of rmcore is installed yet). Every step has a time limit of its own and a failed step does not
stop the next, so that one run tells as much as possible. Results go to $OUT if set, else to ``out/gpu-check``:
``gpu_check.json`` (what each step said), ``gpu.json``/``.csv`` (the kernels), ``encode-gpu.json``/``.csv`` (packed
trees behind a backbone), and one archive of logs and plots.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL_S = 530


def main() -> int:
    """Run the steps; returns 0 only if every step passed."""
    out = Path(os.environ.get("OUT") or ROOT / "out" / "gpu-check").resolve()
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    steps: list[dict[str, Any]] = []

    def left() -> float:
        return TOTAL_S - (time.monotonic() - started)

    def step(name: str, command: list[str], limit: float, **environment: str) -> bool:
        began = time.monotonic()
        log = logs / f"{name}.log"
        with log.open("w") as stream:
            try:
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    timeout=max(5.0, min(limit, left())),
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                code = 124
            except FileNotFoundError as error:
                stream.write(str(error))
                code = 127
        tail = log.read_text(errors="replace").splitlines()[-25:]
        steps.append({"step": name, "rc": code, "seconds": round(time.monotonic() - began, 1), "tail": tail})
        print(f"[{name}] rc={code} {steps[-1]['seconds']} s", flush=True)
        if code:
            print("\n".join(tail), flush=True)
        return code == 0

    architecture = _architecture()
    build = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-v", "-e", "."]
    step("build", build, 180, SKBUILD_CMAKE_DEFINE=f"RMCORE_CUDA=ON;CMAKE_CUDA_ARCHITECTURES={architecture}")
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "--maxfail=8", "-p", "no:cacheprovider", "tests/gpu"]
    step("tests", [a for a in pytest if a != "-x"], 150)
    small = [*pytest, "-k", "sanitizer"]
    for tool in ("memcheck", "racecheck"):
        step(
            tool,
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *small],
            60,
        )
    # A Llama-3.1-8B-shaped backbone over groups of 8 responses, 512 tokens each: padded rows against packed trees.
    encode = [sys.executable, "-m", "rmcore.bench", "--device", "cuda", "--suite", "encode", "--verbose"]
    step("encode", [*encode, "--group", "8", "--lengths", "512+512", "--out", str(out / "encode-gpu")], 150)
    bench = [sys.executable, "-m", "rmcore.bench", "--device", "cuda", "--verbose", "--out", str(out / "gpu")]
    step("bench", bench, max(60.0, left() - 10))
    _archive(out, logs)
    (out / "gpu_check.json").write_text(json.dumps({"steps": steps, "architecture": architecture}, indent=1) + "\n")
    _summary(out, steps)
    return int(any(s["rc"] for s in steps))


def _architecture() -> str:
    code = "import torch; major, minor = torch.cuda.get_device_capability(); print(major * 10 + minor)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    number = done.stdout.strip()
    return {"90": "90a-real", "100": "100a-real"}.get(number, f"{number}-real" if number else "90a-real")


def _archive(out: Path, logs: Path) -> None:
    with tarfile.open(out / "logs-and-plots.tar.gz", "w:gz") as archive:
        for path in [*sorted(logs.iterdir()), *sorted(out.glob("*.png"))]:
            archive.add(path, path.name)
    for path in [*logs.iterdir(), *out.glob("*.png")]:  # few files, so that all of them come back
        path.unlink()
    logs.rmdir()


def _summary(out: Path, steps: list[dict[str, Any]]) -> None:
    results = out / "gpu.json"
    if results.is_file():
        document = json.loads(results.read_text())
        print(f"{document['environment'].get('name')}: {document['limits']['bandwidth'] / 1e12:.2f} TB/s copy")
        print(f"{'variant':42} {'dtype':9} {'h':>5} {'B':>6} {'us':>9} {'limit':>6} {'err v':>8}")
        for row in document["rows"]:
            if row["suite"] == "score" and "median_s" in row and row["rows"] in (1, 16, 64, 256, 4096):
                print(
                    f"{row['variant']:42} {row['dtype']:9} {row['h']:5d} {row['rows']:6d} "
                    f"{1e6 * row['median_s']:9.1f} {100 * row['of_limit']:5.0f}% {row['error_v']:8.1e}"
                )
    results = out / "encode-gpu.json"
    if results.is_file():
        for row in json.loads(results.read_text())["rows"]:
            print(
                f"{row['variant']:42} K={row['k']} {row['lengths']} {row['pairs_per_s']:8.1f} pairs/s "
                f"{100 * row['of_limit']:4.0f}% of the matrix rate, {row['speedup_padded']:.2f}x padded, "
                f"{row['speedup_sorted']:.2f}x sorted, error {row['error']:.1e}"
            )
    for told in steps:
        last = next((line for line in reversed(told["tail"]) if line.strip()), "")
        print(f"{told['step']:10} rc={told['rc']} {told['seconds']:6.1f} s  {last[:100]}")


if __name__ == "__main__":
    raise SystemExit(main())
