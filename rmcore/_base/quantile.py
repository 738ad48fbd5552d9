"""The one definition of a quantile: wherever a p50 or p95 is reported, the same data give the same number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rmcore._base.errors import reject

__all__ = ["quantiles"]


def quantiles(values: npt.ArrayLike, levels: Sequence[float], *, counts: npt.ArrayLike | None = None) -> list[float]:
    """Quantiles, linear between neighbours: numpy's and torch's default, type 7 of Hyndman and Fan (1996).

    The quantile at level q of N sorted values is the one of rank ``q·(N − 1)`` counted from 0, a fractional rank lying
    between two values in proportion.

    Args:
        values: (N,) finite numbers in any order.
        levels: in [0, 1].
        counts: (N,) how often each value occurs, 1 or more: as if it were written down so many times. A value that
            stands for several merged ones may have a fractional count.

    Returns:
        One number a level.

    Raises:
        InputError: no values, or not one count a value.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not found.size:
        reject("values", f"shape {found.shape}", "one-dimensional, one value at least")
    if counts is None:
        return [float(value) for value in np.quantile(found, levels)]
    times = np.asarray(counts, dtype=np.float64)
    if times.shape != found.shape:
        reject("counts", f"shape {times.shape}", f"{found.shape}, one a value")
    order = np.argsort(found, kind="stable")
    found, up_to = found[order], np.cumsum(times[order])
    rank = np.asarray(levels) * (up_to[-1] - 1.0)
    low = np.floor(rank)
    below, above = (
        found[np.minimum(np.searchsorted(up_to, at, side="right"), len(found) - 1)] for at in (low, low + 1.0)
    )
    return [float(value) for value in below + (rank - low) * (above - below)]
