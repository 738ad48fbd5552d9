"""``python -m rmcore.bench`` and ``rmcore bench``: run suites, print and keep each figure as it is measured.

At the end come tables, OUT.json, OUT.csv and plots. A run that is stopped (Ctrl-C, SIGTERM, even SIGKILL) leaves what
it measured in OUT.jsonl, a row a line.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rmcore._base.arguments import real, whole
from rmcore.evaluation.streams import find_data

from .encode import encode_table
from .harness import ISA_VARIABLES, ReadRate, as_dict, compile_apart, environment, measure_limits
from .plots import draw
from .results_file import ResultsFile
from .setup import Row, Setup
from .suites import SUITES

__all__ = ["main"]

HELD_TO = {"avx2": dict(zip(ISA_VARIABLES, ("avx2", "avx2", "AVX2", "AVX2"), strict=True))}
"""``--isa``: the environment that holds us and all peers to it."""

CPU_BATCHES = (1, 4, 16, 64, 256, 1024)
GPU_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 16384)


def setup_for(arguments: argparse.Namespace) -> Setup:
    """The machine's limits and what to measure on it."""
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(0)
    gpu = device.type == "cuda"
    sizes = [(1024, 1024)] if arguments.quick else [(4096, 4096)]
    if gpu and not arguments.quick:
        sizes += [(8192, 8192), (1024, 1024)]
    if arguments.size:
        sizes = [(int(h), int(d)) for h, d in (size.lower().split("x") for size in arguments.size)]
    batches: tuple[int, ...] = GPU_BATCHES if gpu else CPU_BATCHES
    if arguments.batch:
        batches = tuple(arguments.batch)
    elif arguments.quick:
        batches = (1, 16, 256)
    console = Console(stderr=True)
    shown = console.is_terminal or arguments.verbose
    console.print("[dim]measuring this machine's limits[/]")
    reads = ReadRate() if device.type == "cpu" and _has_kernels() else None
    return Setup(
        device=device,
        limits=measure_limits(device, quick=arguments.quick, reads=reads),
        sizes=tuple(sizes),
        batches=batches,
        dtypes=(torch.float16, torch.bfloat16) if gpu else (torch.bfloat16, torch.float16, torch.int8),
        budget_s=arguments.budget or (0.15 if arguments.quick or gpu else 2.0),
        compiled=not (arguments.quick or arguments.no_compile),
        quick=arguments.quick,
        groups=tuple(arguments.group or ()),
        lengths=tuple(arguments.lengths or ()),
        layers=arguments.layers,
        rounds=arguments.rounds,
        data=find_data(arguments.data),
        note=(lambda text: console.print(f"[dim]{text}[/]")) if shown else (lambda _: None),
        reads=reads,
    )


def _has_kernels() -> bool:
    return importlib.util.find_spec("rmcore._cpu") is not None


def run(setup: Setup, suites: list[str], out: Path, console: Console) -> tuple[ResultsFile, bool]:
    """Run the suites, each row printed and kept as it comes. Returns the results, and False if interrupted."""
    header: dict[str, Any] = {
        "environment": environment(setup.device),
        "limits": as_dict(setup.limits),
        "method": "weights rotated over copies that exceed the last-level cache many times; random data; medians",
    }
    results = ResultsFile(out, header)
    console.print(_rates(header["limits"]), highlight=False)
    machine = header["environment"]
    if machine.get("load", 0.0) > 1.5 * machine.get("threads", 1):
        load = f"load {machine['load']:.1f} on {machine['threads']} threads"
        console.print(f"[red]others are at work here ({load}): neither limits nor timings are the machine's[/]")
    bandwidth = setup.limits.bandwidth
    try:
        with _sigterm_interrupts(), results:
            for name in suites:
                for row in SUITES[name](setup):
                    results.add(row)
                    console.print(_line(row), highlight=False, soft_wrap=True, markup=False)
                    bandwidth = max(bandwidth, setup.reads.again() if setup.reads else 0.0)
            results.raise_bandwidth(bandwidth)
    except KeyboardInterrupt:
        return results, False
    return results, True


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM stops a run as Ctrl-C does."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _rates(limits: dict[str, Any]) -> str:
    rates = ", ".join(
        f"{kind} {rate / 1e12:.2f} {'TOP' if kind == 'int8' else 'TFLOP'}/s" for kind, rate in limits["matrix"].items()
    )
    kind = limits.get("matrix_kind", "a large product")
    return f"limits measured: {limits['bandwidth'] / 1e9:.0f} GB/s ({limits['bandwidth_kind']}), {rates} ({kind})"


def _limits_passed(rows: list[Row]) -> str:
    """What to say of rows that are faster than the machine's limit as measured: that limit is wrong. Else nothing.

    A tenth is left to what shares the caches, and to a clock that moves while limits and rows are measured.
    """
    beyond = {f"{row['suite']} {row['variant']}": row["of_limit"] for row in rows if row.get("of_limit", 0.0) > 1.1}
    if not beyond:
        return ""
    most = max(beyond, key=lambda name: beyond[name])
    share = f"{len(beyond)} variants pass the limits measured, {most} at {100 * beyond[most]:.0f}%"
    return f"{share}: the limits are wrong (others at work while they were measured?), and so are the percentages"


def _line(row: Row) -> str:
    """A row as it is printed when measured."""
    if row["suite"] == "encode":
        what = f"{row['lengths']} K={row['k']}"
        figure = f"{row['pairs_per_s']:.2f} pairs/s ({100 * row['of_limit']:.0f}%), {row['speedup_padded']:.2f}× padded"
    else:
        what = f"{row['h']}×{row['d']}" if row.get("d") else f"{row.get('h', '')}"
        what += f" B={row['rows']}" if "rows" in row else ""
        figure = f"{_cell(row)} [build s / first call s / MB]" if row["suite"] == "memory" else f"{_cell(row)} [ms]"
        if row.get("memory_s", 0.0) > row.get("arithmetic_s", 0.0) and "of_read" in row:
            figure += f", {100 * row['of_read']:.0f}% of what was read in turn with it"
    return f"{row['suite']} {what} {row['variant']} {row.get('dtype', '')}: {figure}"


def tables(rows: list[Row], document: dict[str, Any]) -> list[Table]:
    """One table a suite and size: variants down, batch sizes across."""
    limits = document["limits"]
    result = []
    if any(row["suite"] == "encode" for row in rows):
        result.append(encode_table(rows, limits))
    for suite in dict.fromkeys(row["suite"] for row in rows if row["suite"] != "encode"):
        for size in dict.fromkeys((row.get("h"), row.get("d")) for row in rows if row["suite"] == suite):
            mine = [r for r in rows if r["suite"] == suite and (r.get("h"), r.get("d")) == size]
            table = Table(
                title=f"{suite}, h={size[0]}, D={size[1]}: ms (% of limit)",
                caption=_rates(limits),
            )
            batches = sorted({r["rows"] for r in mine if "rows" in r})
            table.add_column("variant")
            for b in batches or ["build s / first call s / MB"]:
                table.add_column(f"B={b}" if batches else str(b), justify="right")
            for variant in dict.fromkeys((r["variant"], r.get("dtype")) for r in mine):
                cells = {r.get("rows"): _cell(r) for r in mine if (r["variant"], r.get("dtype")) == variant}
                table.add_row(f"{variant[0]} {variant[1] or ''}", *[cells.get(b, "") for b in batches or [None]])
            result.append(table)
    return result


def _cell(row: Row) -> str:
    if "failed" in row:
        return "failed"
    if "left_out" in row:
        return f"left out ({row['left_out']})"
    if row["suite"] == "memory":
        return f"{row['build_s']:.2f} / {row['first_call_s']:.3f} / {row['bytes'] / 1e6:.0f}"
    if row["suite"] == "engine":
        return f"{1e3 * row['median_s']:.2f} ({row['ratio']:.2f} times the kernel's {1e3 * row['kernel_s']:.2f})"
    if row["suite"] == "eager":
        goal = f"; goal {row['goal_us']:.0f}" if "goal_us" in row else ""
        return f"{row['host_us']:.1f} us of the host (driver: {row['driver']}{goal})"
    if row["suite"] == "share":
        return f"{1e3 * row['median_s']:.2f} ({100 * row['share_behind_backbone']:.1f}% of a step)"
    wrong = "" if row.get("right", True) else " WRONG"
    return f"{1e3 * row['median_s']:.3f} ({100 * row['of_limit']:.0f}%){wrong}"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 1 if a timed variant of ours gave wrong results, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="rmcore bench", description=__doc__)
    parser.add_argument("--suite", action="append", choices=list(SUITES), help="default: all but encode")
    parser.add_argument("--quick", action="store_true", help="small sizes, ends in about a minute on 2 cores")
    parser.add_argument("--size", action="append", metavar="HxD", help="such as 4096x4096; may be given several times")
    parser.add_argument("--batch", action="append", type=whole(), metavar="B")
    parser.add_argument("--group", action="append", type=whole(), metavar="K", help="encode: responses a prompt")
    parser.add_argument("--lengths", action="append", choices=("autoj", "512+512"), help="encode: default both")
    parser.add_argument("--layers", type=whole(), help="encode: cut the backbone to so many layers, to save time")
    parser.add_argument("--rounds", type=whole(), help="encode: how often the variants take turns")
    parser.add_argument("--data", type=Path, help="encode: preference data for lengths; default RMCORE_DATA, if set")
    parser.add_argument("--device")
    parser.add_argument(
        "--isa",
        choices=sorted(HELD_TO),
        help="CPU: hold us and every peer to this instruction set, whatever more the machine has",
    )
    parser.add_argument("--budget", type=real(least=0), help="seconds a variant")
    parser.add_argument("--no-compile", action="store_true", help="leave the torch.compile peers out")
    parser.add_argument(
        "--out", type=Path, help="results file without its ending; default bench/results/DEVICE or SUITE"
    )
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.isa and any(os.environ.get(name) != value for name, value in HELD_TO[arguments.isa].items()):
        # Each library reads its variable once, some on import: a fresh process is the only way.
        options = sys.argv[1:] if argv is None else argv
        command = [sys.executable, "-m", "rmcore.bench", *options]
        os.execve(sys.executable, command, os.environ | HELD_TO[arguments.isa])  # noqa: S606 (this interpreter)
    compile_apart()
    setup = setup_for(arguments)
    suites = arguments.suite or [name for name in SUITES if name != "encode"]
    name = "encode" if suites == ["encode"] and setup.device.type == "cpu" else setup.device.type
    out = arguments.out or Path("bench/results") / (name + ("-quick" if arguments.quick else ""))
    console = Console(width=None if sys.stdout.isatty() else 160)
    results, complete = run(setup, suites, out, console)
    document, rows = results.document(), results.rows
    for table in tables(rows, document):
        console.print(table)
    if complete:
        pictures = draw(rows, document, out)
        console.print(f"wrote {out}.json, .csv" + "".join(f", {picture.name}" for picture in pictures))
    else:
        console.print(f"interrupted: the {len(rows)} rows measured are in {results.path}; {out}.json is as it was")
    if told := _limits_passed(rows):
        console.print(f"[red]{told}[/]", highlight=False)
    wrong = [
        row for row in rows if row["variant"].startswith("rmcore") and (not row.get("right", True) or "failed" in row)
    ]
    for row in wrong:
        console.print(f"[red]WRONG or failed:[/] {row}")
    if not complete:
        return 130
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
