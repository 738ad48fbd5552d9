"""What ``make gpu-check`` has found on cards, as shipped: the table that spares a check or forbids a kernel.

A row of ``proven.json``, written by ``python -m bench.gpu_check report``, is one operation of one backend on one card
with one version of Triton (none for ``cuda``): whether every case was right, and whether its bits stayed the same over
fifty calls. A kernel that was wrong or whose bits moved does not serve with that version, whatever its sources have
become since: only a newer row says otherwise. One that passed needs no check where the sources are the same.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

__all__ = ["Finding", "finding", "findings"]


class Finding(NamedTuple):
    """One row.

    Attributes:
        card: as torch names it.
        backend: ``cuda`` or ``triton``.
        op: as in :mod:`rmcore.ops`.
        triton: its version; empty for ``cuda``.
        commit: of the run.
        sources: the digest of what ran (:func:`rmcore.ops.sources.sources`).
        right: every case within its tolerance.
        bits_equal: the same bits at every call.
    """

    card: str
    backend: str
    op: str
    triton: str
    commit: str
    sources: str
    right: bool
    bits_equal: bool

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What a row is about; a later row with the same key replaces it."""
        return self.card, self.backend, self.op, self.triton

    def objection(self) -> str | None:
        """Why this kernel must not serve, or None."""
        if self.right and self.bits_equal:
            return None
        what = "its results were wrong" if not self.right else "its bits moved from call to call"
        version = f" with Triton {self.triton}" if self.triton else ""
        return f"{what} on {self.card}{version} when it was measured there (commit {self.commit})"


@functools.cache
def findings() -> dict[tuple[str, str, str, str], Finding]:
    """The shipped table by key."""
    rows = json.loads(Path(__file__).with_name("proven.json").read_text(encoding="utf-8"))
    return {found.key: found for found in (Finding(**row) for row in rows)}


def finding(card: str, backend: str, op: str, triton: str) -> Finding | None:
    """What is known of ``op`` of a backend on a card; ``triton`` is the installed version, for that backend."""
    return findings().get((card, backend, op, triton if backend == "triton" else ""))
