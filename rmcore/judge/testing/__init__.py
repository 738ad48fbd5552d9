"""Recorded verdicts served over real HTTP on this machine: for tests, for the demo, and for load without a bill.

:class:`ReplayServer` is the one fake judge there is. It answers the requests that :class:`~rmcore.judge.chat.ChatJudge`
makes, and goes wrong in the ways of :mod:`rmcore.judge.testing.faults`, one by one or mixed (:class:`FaultMix`).

    python -m rmcore.judge.testing VERDICTS.jsonl      # prints the base URL, serves until Ctrl-C or SIGTERM
"""

from __future__ import annotations

from rmcore.judge.testing.fault import Again, Ending, Fault
from rmcore.judge.testing.fault_mix import FaultMix, Storm
from rmcore.judge.testing.faults import FAULTS, STORM_FAULTS
from rmcore.judge.testing.server import ReplayServer

__all__ = ["FAULTS", "STORM_FAULTS", "Again", "Ending", "Fault", "FaultMix", "ReplayServer", "Storm"]
