"""Measure candidates for the rows of kernels/heuristics.py on this GPU, and print the best of each as table rows.

    python tests/gpu/tune_triton.py [--kernels project product gram] [--rows 64 128 256 512 1024 4096] [--size 4096]

Candidates are compiled first, in parallel and without the GPU; those that spill are dropped. The rest are timed cold:
graph replays that rotate over enough copies of the weights to leave the L2. ``--compile-only`` needs no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import compile_triton

SHARED = compile_triton.SHARED_LIMIT
COPIED_BYTES = 256 << 20
"""Weights a timed loop goes through before it meets the same copy again: several times any L2."""


def candidates(kernel: str, rows: int, arch: int) -> list[Any]:
    """Tiles worth trying: those that fit, with neither idle nor overfull registers."""
    from rmcore.kernels.heuristics import Tile

    if rows >= 8192 and kernel != "gram":  # tiles as for 4096, which is enough of them: what shares the L2 is left
        wide = [Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 4, 4)]
        return [tile._replace(group=group) for tile in wide for group in (4, 8, 16, 32, 64)]
    found = []
    heights = [16] if rows <= 16 else [32] if rows <= 32 else [64] if rows <= 64 else [64, 128, 256]
    heights = [64, 128] if kernel == "gram" else heights
    for bm, bn, bk, warps, stages in itertools.product(
        heights, (16, 32, 64, 128, 256), (32, 64, 128, 256), (4, 8), (3, 4, 5)
    ):
        if bn == 16 and rows > 64:
            continue  # few rows: many narrow programs, so that every multiprocessor reads
        shared, held = (bm + bn) * bk * 2 * stages, bm * bn // (32 * warps)
        if not (48 << 10 <= shared <= SHARED[arch]) or not 4 <= held <= 128:
            continue
        if kernel == "gram" and (bn < bm or bn < 128):
            continue
        if kernel == "product" and bk > 128:
            continue
        group = 32 if kernel == "product" else 8
        tile = Tile(bm, bn, bk, warps, stages, group=group)
        if kernel == "product" and rows <= 512 and bn == 128:
            found += [tile._replace(fill=fill) for fill in (1.25, 2.25)]
        if kernel == "product" and rows > 16:
            found += [tile, tile._replace(paired=True)] if rows <= 2048 else [tile]
        if kernel == "project":
            found += [tile, *(tile._replace(fill=fill) for fill in (1.0, 2.0) if rows <= 512)]
        if kernel == "gram":
            found.append(tile)
    if kernel == "gram":  # first, so that no limit leaves them out: the last wave cut, beside the same tile whole
        wide = Tile(128, 256, 64, 8, 4)
        found = [wide, wide._replace(tail=True), *found]
    return found


class Problem:
    """One kernel on one size: its operands, in as many copies as the L2 asks for, and one call of it."""

    def __init__(self, kernel: str, rows: int, size: int, dtype: torch.dtype, device: str, copies: int) -> None:
        self.kernel, self.rows, self.size = kernel, rows, size

        def random(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=of, device=device).normal_(std=0.1)

        self.x = random(rows, size)
        n = math.ceil(size / 128)
        shape = {"project": (size, size), "product": (n * (n + 1) // 2, 128, 128), "gram": (rows, size)}[kernel]
        self.weights = [random(*shape) for _ in range(copies)]
        self.vector = random(size, of=torch.float32)
        self.precision = random(size, size, of=torch.float32) if kernel == "gram" else None

    @property
    def flop(self) -> float:
        """What the kernel must compute."""
        return self.rows * self.size * (2.0 * self.size if self.kernel == "project" else self.size + 128)

    def __call__(self, tile: Any, device: Any, turn: int = 0) -> None:
        """Launch with ``tile`` in place of the table's."""
        from rmcore.kernels import features, gram, heuristics, variance
        from rmcore.kernels.common import COSINE

        weight = self.weights[turn % len(self.weights)]
        with mock.patch.object(heuristics, self.kernel, return_value=tile):
            if self.kernel == "project":
                features.project(self.x, weight, self.vector, device, epilogue=COSINE, beta=self.vector)
            elif self.kernel == "product":
                variance.squares(self.x, weight, self.size, device)
            else:
                assert self.precision is not None
                gram.gram(weight, self.precision, device, scale=1.0)


def sound(kernel: str, rows: int, size: int, arch: int, count: int, tiles: list[Any]) -> list[Any]:
    """Those of ``tiles`` that compile without a fault, for a device of ``count`` multiprocessors. Needs no GPU."""
    from rmcore.kernels.heuristics import Device

    problem = Problem(kernel, rows, size, torch.float16, "meta", 1)
    kept = []
    with compile_triton.compiling(arch) as builds:
        for tile in tiles:
            builds.clear()
            try:
                problem(tile, Device(compile_triton.KIND[arch], count))
            except Exception as error:  # a tile this Triton cannot compile is no candidate
                print(f"{tile}: {type(error).__name__}", file=sys.stderr)
                continue
            if not any(compile_triton.faults(build) for build in builds.values()):
                kept.append(tile)
    return kept


def microseconds(problem: Problem, tile: Any, device: Any) -> float:
    """Median time of one call, over replays of a graph that goes through every copy of the weights."""
    turns = max(len(problem.weights), 4)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        problem(tile, device)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(turns):
            problem(tile, device, turn)
    graph.replay()
    times = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / turns)
    return statistics.median(times)


def main() -> None:
    """Compile, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernels", nargs="+", default=["project", "product", "gram"])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 4096])
    parser.add_argument("--size", type=int, default=4096, help="h = D")
    parser.add_argument("--gram-rows", type=int, default=16384, help="rows of a chunk of accumulate")
    parser.add_argument("--compile-only", type=int, metavar="ARCH", help="for this compute capability, e.g. 90")
    parser.add_argument("--limit", type=int, help="candidates a problem, evenly taken")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arch, count = arguments.compile_only, 132
    if not arch:
        properties = torch.cuda.get_device_properties(0)
        arch, count = properties.major * 10 + properties.minor, properties.multi_processor_count
    results = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for kernel in arguments.kernels:
            for rows in [arguments.gram_rows] if kernel == "gram" else arguments.rows:
                tiles = candidates(kernel, rows, arch)
                tiles = tiles[:: max(1, len(tiles) // arguments.limit)] if arguments.limit else tiles
                shares = [tiles[i :: os.cpu_count()] for i in range(os.cpu_count() or 1)]
                jobs = [pool.submit(sound, kernel, rows, arguments.size, arch, count, share) for share in shares]
                tiles = [tile for job in jobs for tile in job.result()]
                print(f"\n{kernel}, {rows} rows, h = D = {arguments.size}: {len(tiles)} candidates", flush=True)
                if not arguments.compile_only:
                    results += measure(kernel, rows, arguments.size, tiles)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def measure(kernel: str, rows: int, size: int, tiles: list[Any]) -> list[dict[str, Any]]:
    """Time the candidates and the table's own tile; print the best five."""
    from rmcore.kernels import heuristics

    device = heuristics.device(torch.device("cuda", 0))
    weight_bytes = size * size * 2 if kernel == "project" else size * (size + 128)
    copies = 1 if kernel == "gram" else max(2, COPIED_BYTES // weight_bytes + 1) if rows <= 2048 else 2
    problem = Problem(kernel, rows, size, torch.float16, "cuda", copies)
    current = getattr(heuristics, kernel)(device, 2, size if kernel == "gram" else rows)
    timed = sorted((microseconds(problem, tile, device), tile) for tile in {current, *tiles})
    for time, tile in [*timed[:5], *((t, tile) for t, tile in timed if tile == current)]:
        mark = "  <- the table's" if tile == current else ""
        print(f"{time:9.1f} us {problem.flop / time / 1e6:7.0f} TFLOP/s  {tile}{mark}", flush=True)
    return [{"kernel": kernel, "rows": rows, "size": size, "us": time, **tile._asdict()} for time, tile in timed]


if __name__ == "__main__":
    main()
