"""The persistent forms for compile_triton.py: calls that compile all of them, and what is asked of loads by descriptor.

Triton 3.6 parts a tile between two consumers without parting the box of a descriptor that the host made, and so copies
more than there is room for; newer ones refuse (triton-lang/triton#11587). Ours are made on the device, where the
compiler makes one for each part: that every box is as large as what it is copied to is asked of every build.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch


def calls(
    quick: bool,
    weights: Callable[..., Any],
    score: Callable[..., None],
    accumulate: Callable[..., None],
) -> Iterator[Callable[[], None]]:
    """Both forms at every row of their tables, for Hopper, which alone has any."""
    from rmcore.kernels import heuristics_tma
    from rmcore.ops.backends import triton_tma

    def formed(form: str, call: Callable[..., None], *args: Any) -> None:
        with triton_tma.choosing(triton_tma.Large(form, 1)):
            call(*args)

    half = torch.float16
    for form in heuristics_tma.FORMS:
        for rows in (1024, 8192) if quick else (512, 1024, 4096, 8192):
            yield functools.partial(formed, form, score, weights(4096, 4096, half), rows, half)
        yield functools.partial(formed, form, accumulate, weights(4096, 4096, half), torch.float32, half, 16384)
        if quick:
            continue
        brain = torch.bfloat16
        for d in (2048, 8192):
            yield functools.partial(formed, form, accumulate, weights(d, d, half), torch.float64, half, 16383)
        yield functools.partial(formed, form, accumulate, weights(4096, 4096, brain), torch.float32, brain, 16384)
        for h, d in ((4096, 4096), (1000, 1003), (448, 1008)):
            for rows in (512, 1023, 8191):
                yield functools.partial(formed, form, score, weights(h, d, brain), rows, brain)
                yield functools.partial(formed, form, score, weights(h, d, half), rows, brain)


def descriptor_loads(ptx: str) -> int:
    """Instructions that ask for a box of a tensor."""
    return len(re.findall(r"cp\.async\.bulk\.tensor\.\d+d\.shared\S*\.global", ptx))


def torn(ttgir: str) -> bool:
    """Whether a box is copied to a place of another size."""
    pattern = (
        r"async_tma_copy_global_to_local[^\n]*?tensordesc<(?:tensor<)?([\dx]+)x\w+[^\n]*?-> !ttg\.memdesc<([\dx]+)x\w+"
    )
    boxes = re.findall(pattern, ttgir)
    assert len(boxes) == len(re.findall("async_tma_copy_global_to_local", ttgir)), "the compiler writes them otherwise"
    return any(math.prod(map(int, box.split("x"))) != math.prod(map(int, room.split("x"))) for box, room in boxes)
