"""Training data from which a fit learns next to nothing, told by name and with numbers before it is fitted.

Such a fit does not fail: β is found, and a posterior. What it says of responses to come is the prior's, so somebody
must hear of it.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from rmcore._base.errors import reject

__all__ = ["warn_if_degenerate"]

log = logging.getLogger(__name__)

_GLANCE = 64
"""Data looked at first: ordinary ones differ there, and the others need no look."""


def warn_if_degenerate(hidden: Tensor, labels: Tensor, pairs: Tensor | None) -> None:
    """Warn of data that are all one, of labels that are all even, or all of one side where that says nothing.

    Args:
        hidden: (R, h) rows.
        labels: (N,) in [0, 1].
        pairs: (N, 2) rows of each pair (difference mode), or None where each row is a pair (concat mode).

    Raises:
        InputError: in difference mode, no pair's two rows differ.
    """
    count = len(labels)
    if pairs is not None and _all_equal(hidden, pairs[:, 0], pairs[:, 1]):
        reject("pairs", f"{count} pairs of equal hidden rows", "at least one pair whose rows differ")
    firsts = pairs[:, 0] if pairs is not None else torch.arange(count, device=hidden.device)
    same = _all_equal(hidden, firsts, firsts[:1].expand(count))
    if same and pairs is not None:
        same = _all_equal(hidden, pairs[:, 1], pairs[:1, 1].expand(count))
    if count == 1:
        log.warning("degenerate fit: a single training pair; all that is unlike it keeps the prior's uncertainty")
    elif same:
        log.warning("degenerate fit: the %d training pairs are one pair %d times over", count, count)
    if bool((labels == 0.5).all()):
        log.warning("degenerate fit: all %d labels are 0.5, so the head will prefer no response to another", count)
    elif pairs is None and (bool((labels > 0.5).all()) or bool((labels < 0.5).all())):
        side = "first" if bool((labels > 0.5).all()) else "second"
        log.warning(
            "degenerate fit: all %d labels say that the %s response is better, so the head learns the order, not the "
            "responses: give pairs in both orders",
            count,
            side,
        )


def _all_equal(hidden: Tensor, one: Tensor, other: Tensor) -> bool:
    """Whether the rows at ``one`` and ``other`` are equal throughout."""
    for a, b in ((one[:_GLANCE], other[:_GLANCE]), *zip(one.split(4096), other.split(4096), strict=True)):
        if not torch.equal(hidden[a], hidden[b]):
            return False
    return True
