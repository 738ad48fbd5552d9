"""What a run of the suites is given, and what a suite gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .harness import Limits, ReadRate

__all__ = ["Row", "Setup"]

Row = dict[str, Any]
"""One variant at one size: a line of the results file."""


@dataclass(frozen=True)
class Setup:
    """What to measure and on what."""

    device: torch.device
    limits: Limits
    sizes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    budget_s: float
    compiled: bool = True
    note: Callable[[str], None] = lambda _text: None
    quick: bool = False
    groups: tuple[int, ...] = ()
    lengths: tuple[str, ...] = ()
    layers: int | None = None
    rounds: int | None = None
    data: Path | None = None
    reads: ReadRate | None = None
    """What reads a CPU's memory, to be asked again and beside others; None where nothing does."""
