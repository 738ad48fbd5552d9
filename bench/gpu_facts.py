"""What every step of ``make gpu-check``'s probe works with: its options, and the file that its facts go to."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmcore import ops
from rmcore.bench import harness, peers
from rmcore.ops.sources import kernel_of

__all__ = ["Probe", "repeats", "timed_facts"]

POISON = ("illegal", "misaligned", "unspecified launch", "device-side assert", "hardware stack")
"""What CUDA says when a context is lost for good."""


class Probe:
    """What every step works with: its options, and the file that its facts go to."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.step, self.repeats, self.budget_s = options.step, options.repeats, options.budget
        self.device = torch.device(options.device)
        self.dtype: torch.dtype = getattr(torch, options.dtype)
        self.rows_dtype = torch.float16 if self.dtype == torch.int8 else self.dtype
        self.size: int = options.size
        self.rows: tuple[int, ...] = tuple(options.rows or ())
        self.backends: list[str] = options.backends
        self.forms: list[str] = options.forms
        self.path = Path(options.out or os.environ.get("RMCORE_GPU_ROWS", "rows.jsonl"))
        self.path.touch()

    def write(self, case: str, **facts: Any) -> None:
        """A fact, on disk when this returns."""
        row = {"step": self.step, "case": case, "size": self.size, "dtype": str(self.dtype)[6:], **facts}
        line = json.dumps(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line[:300], flush=True)

    def attempt(self, case: str, measure: Callable[[], dict[str, Any]], **facts: Any) -> None:
        """Measure one case; what it raises is a fact too."""
        began = time.monotonic()
        try:
            found = measure()
            harness.synchronize(self.device)
        except Exception as error:  # whatever it was, the next case is worth trying
            message = f"{type(error).__name__}: {error}"
            self.write(case, **facts, failed=message[:400], trace=traceback.format_exc()[-800:])
            if any(word in str(error).lower() for word in POISON):
                sys.exit(3)
            return
        self.write(case, **facts, **found, wall_s=round(time.monotonic() - began, 3))

    def problem(self) -> peers.Problem:
        """The head to score, of the size asked for."""
        return peers.make_problem(self.size, self.size, self.device, self.dtype)

    def hidden(self, rows: int) -> Tensor:
        """Random rows, the same for the same count."""
        generator = torch.Generator().manual_seed(rows)
        return torch.randn(rows, self.size, generator=generator).to(self.rows_dtype).to(self.device)

    def runnable(self, op: str, rows: int | None = None, weights: Any = None) -> Iterator[str]:
        """The backends asked for that can run ``op``; for the others a row says why not."""
        for backend in self.backends:
            found = ops.explain(op, self.device, self.dtype, backend, rows=rows, weights=weights)  # type: ignore[arg-type]
            if found.backend == "none":
                self.write(f"{kernel_of(op, self.dtype)} {backend}", rows=rows, declined=found.reasons[backend])
            else:
                yield backend


def repeats(probe: Probe, call: Callable[[], tuple[Tensor, ...]]) -> bool:
    """Whether every call gives the bits of the first; one that moves is a race."""
    first = [part.clone() for part in call()]
    same = torch.ones((), dtype=torch.bool, device=probe.device)
    for _ in range(probe.repeats):
        for part, before in zip(call(), first, strict=True):
            same &= (part == before).all()
    return bool(same)


def timed_facts(t: harness.Timing) -> dict[str, Any]:
    """A timing as a row has it."""
    return {"us": 1e6 * t.median, "p10_us": 1e6 * t.low, "p90_us": 1e6 * t.high, "method": t.method}
