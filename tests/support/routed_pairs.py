"""Pairs with head, judge and label for tests of statistics."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

__all__ = ["NAN", "routed"]


NAN = float("nan")


@st.composite
def routed(draw):
    """A score with many ties, and what head and judge get right; some pairs without a verdict."""
    n = draw(st.integers(1, 30))
    column = lambda values: np.array(draw(st.lists(st.sampled_from(values), min_size=n, max_size=n)))  # noqa: E731
    return column([-2.0, 0.0, 0.5, 1e9]), column([0.0, 0.5, 1.0]), column([0.0, 0.5, 1.0, NAN])
