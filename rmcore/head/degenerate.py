"""Training data from which a fit learns next to nothing, told by name and with numbers before it is fitted.

Such a fit does not fail: β is found, and a posterior. What it says of responses to come is the prior's, so somebody
must hear of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.head.ranks import Ranks

__all__ = ["told_already", "warn_if_degenerate", "warn_if_undecided"]

log = logging.getLogger(__name__)

_GLANCE = 64
"""Data looked at first: ordinary ones differ there, and the others need no look."""
_TOLD: ContextVar[bool] = ContextVar("told", default=False)


@contextmanager
def told_already() -> Iterator[None]:
    """Inside, nothing is warned of: parts of data whose whole has been looked at."""
    token = _TOLD.set(True)
    try:
        yield
    finally:
        _TOLD.reset(token)


def warn_if_degenerate(hidden: Tensor, labels: Tensor, pairs: Tensor | None, ranks: Ranks | None = None) -> None:
    """Warn of data that are all one, of labels that are all even, or all of one side where that says nothing.

    Args:
        hidden: (R, h) rows.
        labels: (N,) in [0, 1].
        pairs: (N, 2) rows of each pair (difference mode), or None where each row is a pair (concat mode).
        ranks: of whose data these are a part, none of them if N = 0; rank 0 warns.

    Raises:
        InputError: in difference mode, no pair's two rows differ.
    """
    facts = _facts(hidden, labels, pairs)
    if ranks is not None:
        facts = _Facts.together([_Facts.read(told) for told in ranks.each(facts.told())])
    if facts.no_pair:
        reject("pairs", f"{facts.count} pairs of equal hidden rows", "at least one pair whose rows differ")
    if _TOLD.get() or (ranks is not None and ranks.rank > 0):
        return
    if facts.count == 1:
        log.warning("degenerate fit: a single training pair; all that is unlike it keeps the prior's uncertainty")
    elif facts.one_datum:
        log.warning("degenerate fit: the %d training pairs are one pair %d times over", facts.count, facts.count)
    if facts.even:
        log.warning(
            "degenerate fit: all %d labels are 0.5, so the head will prefer no response to another", facts.count
        )
    elif pairs is None and (facts.first or facts.second):
        log.warning(
            "degenerate fit: all %d labels say that the %s response is better, so the head learns the order, not the "
            "responses: give pairs in both orders",
            facts.count,
            "first" if facts.first else "second",
        )


def warn_if_undecided(beta: Tensor, labels: Tensor) -> None:
    """Warn of a head that prefers nothing although labels are not all even: they contradict each other."""
    if not _TOLD.get() and len(labels) and float(beta.abs().max()) < 1e-9 and not bool((labels == 0.5).all()):
        log.warning(
            "degenerate fit: the head prefers no response to another: the %d labels contradict each other evenly, or "
            "their pairs differ in nothing that it sees",
            len(labels),
        )


@dataclass(frozen=True)
class _Facts:
    """What is wrong with some data; all of it where there are none."""

    count: int
    no_pair: bool
    """Every pair's two rows are equal."""
    one_datum: bool
    even: bool
    first: bool
    second: bool
    datum: Tensor
    """The first one's rows (h,) or (2h,), float64."""

    def told(self) -> Tensor:
        """As one vector, the datum's rows last."""
        flags = [self.count, self.no_pair, self.one_datum, self.even, self.first, self.second]
        return torch.cat([self.datum.new_tensor(flags), self.datum])

    @classmethod
    def read(cls, told: Tensor) -> _Facts:
        """The inverse of :meth:`told`."""
        count, no_pair, one_datum, even, first, second = told[:6].tolist()
        return cls(int(count), bool(no_pair), bool(one_datum), bool(even), bool(first), bool(second), told[6:])

    @classmethod
    def together(cls, parts: list[_Facts]) -> _Facts:
        """Of all parts' data."""
        parts = [part for part in parts if part.count] or parts[:1]
        return cls(
            sum(part.count for part in parts),
            no_pair=all(part.no_pair for part in parts),
            one_datum=all(part.one_datum and torch.equal(part.datum, parts[0].datum) for part in parts),
            even=all(part.even for part in parts),
            first=all(part.first for part in parts),
            second=all(part.second for part in parts),
            datum=parts[0].datum,
        )


def _facts(hidden: Tensor, labels: Tensor, pairs: Tensor | None) -> _Facts:
    count = len(labels)
    if not count:
        width = hidden.shape[1] * (1 if pairs is None else 2)
        return _Facts(0, pairs is not None, True, True, True, True, torch.zeros(width, dtype=torch.float64))
    firsts = pairs[:, 0] if pairs is not None else torch.arange(count, device=hidden.device)
    same = _all_equal(hidden, firsts, firsts[:1].expand(count))
    if same and pairs is not None:
        same = _all_equal(hidden, pairs[:, 1], pairs[:1, 1].expand(count))
    return _Facts(
        count,
        no_pair=pairs is not None and _all_equal(hidden, pairs[:, 0], pairs[:, 1]),
        one_datum=same,
        even=bool((labels == 0.5).all()),
        first=bool((labels > 0.5).all()),
        second=bool((labels < 0.5).all()),
        datum=hidden[firsts[0] if pairs is None else pairs[0]].detach().double().cpu().flatten(),
    )


def _all_equal(hidden: Tensor, one: Tensor, other: Tensor) -> bool:
    """Whether the rows at ``one`` and ``other`` are equal throughout."""
    for a, b in ((one[:_GLANCE], other[:_GLANCE]), *zip(one.split(4096), other.split(4096), strict=True)):
        if not torch.equal(hidden[a], hidden[b]):
            return False
    return True
