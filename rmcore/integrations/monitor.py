"""Curves of a run's reward over its steps, for any trainer of transformers' kind: a file of rows, and a plot.

    trainer = GRPOTrainer(..., reward_funcs=reward, callbacks=[RewardMonitor()])

The figures are those that the reward logs (``rmcore/…``), so they are in what ``report_to`` names (Weights & Biases,
TensorBoard, …) as well; here they are kept in ``rmcore_monitor.jsonl`` in the output folder and drawn to
``rmcore_monitor.png``: share of pairs routed, quantiles of u, and judge against head, which is where reward hacking
shows first. A run that goes on from a checkpoint goes on with its curves.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rmcore._base.files import write_atomic
from rmcore.evaluation.plots import PlotsUnavailableError
from rmcore.evaluation.plots.monitor import MONITOR_PREFIX, plot_monitor

__all__ = ["RewardMonitor"]

log = logging.getLogger(__name__)


class RewardMonitor(TrainerCallback):  # type: ignore[misc]
    """Keeps and draws what a reward logs.

    Args:
        folder: for the two files; default: the trainer's ``output_dir``.
        plot: draw at each checkpoint and at the end (needs matplotlib; without it a warning says so once).

    Attributes:
        rows: of this run, each with ``step`` and the logged ``rmcore/…``.
    """

    def __init__(self, folder: str | Path | None = None, *, plot: bool = True) -> None:
        self.folder = None if folder is None else Path(folder)
        self.plot = plot
        self.rows: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take up the rows of a run that goes on; begin anew otherwise."""
        self.rows = []
        file = self._file(args, "jsonl")
        if state.is_world_process_zero and state.global_step and file.is_file():
            try:
                kept = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
                self.rows = [row for row in kept if row["step"] <= state.global_step]
            except (ValueError, TypeError, KeyError):
                log.warning("%s cannot be read; its curves begin anew", file)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Keep a row."""
        found = {name: float(value) for name, value in (logs or {}).items() if name.startswith(MONITOR_PREFIX)}
        if not found or not state.is_world_process_zero:
            return
        self.rows.append({"step": state.global_step, **found})
        # NaN is no JSON: what is unknown is left out of the row.
        rows = ({name: value for name, value in row.items() if math.isfinite(value)} for row in self.rows)
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        file = self._file(args, "jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, text.encode())

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw."""
        self._draw(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw for the last time."""
        self._draw(args, state)

    def _draw(self, args: Any, state: Any) -> None:
        if not (self.plot and self.rows and state.is_world_process_zero):
            return
        try:
            plot_monitor(self.rows, self._file(args, "png"))
        except PlotsUnavailableError as error:
            log.warning("%s", error)
            self.plot = False

    def _file(self, args: Any, ending: str) -> Path:
        return (self.folder or Path(args.output_dir)) / f"rmcore_monitor.{ending}"
