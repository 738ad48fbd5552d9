"""The uncertainty head: a linear layer's worth of parameters between hidden states and (g, v).

- ``config``: what a head is made of.
- ``sngp``: the trainable head; ``fit`` trains it, ``posterior`` is what the fit leaves.
- ``frozen``: the head that serves; ``checkpoint`` stores it.
"""

from __future__ import annotations

from rmcore.head.config import HeadConfig, PairMode
from rmcore.head.frozen import FrozenHead, PairScores
from rmcore.head.sngp import SNGPHead

__all__ = ["FrozenHead", "HeadConfig", "PairMode", "PairScores", "SNGPHead"]
