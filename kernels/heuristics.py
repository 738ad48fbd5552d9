"""What to launch: one table per kernel, (device kind, operand bytes, size) → tile, warps, stages; and how to read it.

Rows marked "measured" are the tuner's best on an H100 (2026-11-28, h = D = 4096, fp16; tests/gpu/tune_triton.py). The
others follow from the figures below. All compile without spills:

- HBM: a multiprocessor needs about 30 KB of loads in flight, hence deep pipelines where few rows make the weights
  the cost.
- L2 to multiprocessors, about 7 TB/s on Hopper: at full matrix rate a 128×256 tile reads 48 B a clock, 128×128 reads
  64, 64×128 reads 96. Tiles are as large as still fill the device; below that the reduction is cut (``fill``).
- Triton 3.6.0 serialises the matrix instructions of 128×128 tiles with 8 warps (ptxas C7515) where 3.7.1 does not; all
  rows here are sound under both (``make triton-gate``).
- 4 stages of 128×256×64 in 16 bits take 192 KB: one program a multiprocessor, 216 registers a thread with 8 warps.

A measured row replaces one here together with the run that justifies it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

__all__ = [
    "CHOICES",
    "FORMS",
    "STAGED_ROWS",
    "WEIGH",
    "Device",
    "Tile",
    "cuts",
    "device",
    "forms",
    "gram",
    "power",
    "product",
    "project",
    "span",
    "splits",
]


class Tile(NamedTuple):
    """How one launch is cut.

    Attributes:
        rows: of the output block.
        cols: of the output block.
        depth: step along the reduction.
        warps: of a program.
        stages: of its load pipeline.
        group: row tiles in a strip of programs that share operands in the L2.
        fill: 0 leaves the reduction whole; otherwise it is cut into pieces until this many programs a multiprocessor.
        tail: tiles beyond the last whole wave are cut along the reduction, so that they take a part of a wave.
        paired: where tasks are more than multiprocessors, but no more than twice as many, a program takes a long and a
            short row of the triangle.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    fill: float = 0.0
    paired: bool = False
    tail: bool = False


class Device(NamedTuple):
    """A device as the tables know it."""

    kind: str
    multiprocessors: int


_Table = dict[tuple[str, int], tuple[tuple[float, Tile], ...]]
_ANY = float("inf")
_MIN_STEPS = 4
"""A piece of a cut reduction has at least this many steps, or its pipeline never fills."""

CHOICES = {
    "launch": ("plain", "overlapped"),
    "pairs": ("by pairs", "by groups", "in the product"),
    "tail": ("apart", "last"),
}
"""Where there are several ways to do the same; the first of each is the oldest one.

launch
    ``plain``, or ``overlapped``: programmatic dependent launch (Hopper and later), see ``common.after_the_last``.
pairs
    ``by pairs``: 16 pairs a program, whose rows come from the L2 several times; or ``by groups``: all pairs of a group
    in one program, which reads each row of y once; or ``in the product``: groups of 2, 4 or 8 rows, whose distances
    are taken from the product's accumulators, so that y is never stored (pair_tail.py).
tail
    ``apart``: pieces, squares and scores are launches of their own; or ``last``: whichever program is the last to come
    adds up, so that U c and all that follows is one launch (score_tail.py).
"""

FORMS = {name: choices[0] for name, choices in CHOICES.items()}
"""The way taken, as far as a GPU has said which is faster: ``plain`` and ``by pairs`` (an H100, 2026-11-28). ``last``
and ``in the product`` have not run on one."""

STAGED_ROWS = 33
"""From this many rows on, hidden states in a foreign dtype are converted once, by a kernel of their own, rather than by
every column of tiles: an operand converted on its way keeps Hopper's matrix instructions from overlapping."""

WEIGH = Tile(64, 128, 0, 4, 1)

# x weightᵀ: (kind, bytes of an element) → rows (at most this many rows of x, tile)
_PROJECT: _Table = {
    ("sm90", 2): (
        (16, Tile(16, 32, 256, 4, 4, fill=1.0)),
        (32, Tile(32, 32, 256, 4, 3, fill=1.0)),
        (128, Tile(64, 64, 128, 4, 4, fill=1.0)),  # measured: 18.3 µs, 22.5 with what was here; at 64 rows with fewer
        (256, Tile(64, 64, 64, 4, 5)),  # measured: 23.9, 29.5; Triton 3.6 serialises the one tile that takes 23.6
        (_ANY, Tile(128, 256, 64, 8, 4, fill=1.0)),  # measured at 1024 rows: 55.8, the best of 25
    ),
    ("sm90", 4): ((64, Tile(32, 64, 16, 4, 4, fill=2.0)), (_ANY, Tile(64, 64, 32, 4, 3))),
    ("sm80", 2): (
        (16, Tile(16, 32, 256, 4, 4, fill=1.0)),
        (32, Tile(32, 64, 128, 4, 4, fill=1.0)),
        (64, Tile(64, 128, 64, 4, 4, fill=1.0)),
        (512, Tile(128, 128, 64, 8, 3, fill=1.0)),
        (_ANY, Tile(128, 256, 32, 8, 4)),
    ),
    ("sm80", 4): ((64, Tile(32, 64, 16, 4, 4, fill=2.0)), (_ANY, Tile(64, 64, 32, 4, 3))),
    ("portable", 2): (
        (16, Tile(16, 32, 128, 4, 4, fill=2.0)),
        (64, Tile(64, 64, 64, 4, 3, fill=2.0)),
        (_ANY, Tile(128, 128, 32, 8, 3)),
    ),
    ("portable", 4): ((64, Tile(32, 64, 16, 4, 3, fill=2.0)), (_ANY, Tile(64, 64, 32, 4, 2))),
    ("interpreter", 2): ((64, Tile(64, 128, 128, 4, 1, fill=1.0)), (_ANY, Tile(128, 256, 128, 4, 1))),
    ("interpreter", 4): ((64, Tile(64, 128, 128, 4, 1, fill=1.0)), (_ANY, Tile(128, 256, 128, 4, 1))),
}

# U c over the triangle: rows as above. Where ``fill`` > 0, cols is 128, the edge of U's packed tiles.
_PRODUCT: _Table = {
    ("sm90", 2): (
        (16, Tile(16, 128, 128, 4, 4, fill=1.25)),
        (32, Tile(32, 128, 128, 4, 4, fill=1.25)),
        (128, Tile(64, 32, 128, 4, 5, group=32, paired=True)),  # measured: 12.7 µs, 18.7 with what was here
        (256, Tile(64, 128, 128, 4, 4, group=32, paired=True)),  # measured: 17.0, 24.9
        (512, Tile(64, 128, 64, 4, 5, group=32, paired=True)),
        (1024, Tile(128, 128, 64, 4, 4, group=32, paired=True)),  # measured: 31.8, the best of 26
        (_ANY, Tile(128, 256, 64, 8, 4, group=32)),
    ),
    ("sm90", 4): ((64, Tile(32, 128, 32, 4, 3, fill=2.0)), (_ANY, Tile(64, 64, 16, 4, 4, group=32))),
    ("sm80", 2): (
        (16, Tile(16, 128, 128, 4, 4, fill=1.25)),
        (64, Tile(64, 128, 64, 4, 4, fill=1.25)),
        (256, Tile(128, 128, 64, 8, 3, fill=2.25)),
        (1024, Tile(128, 128, 64, 8, 4, group=32, paired=True)),
        (_ANY, Tile(128, 256, 32, 8, 4, group=32)),
    ),
    ("sm80", 4): ((64, Tile(32, 128, 32, 4, 3, fill=2.0)), (_ANY, Tile(64, 64, 16, 4, 4, group=32))),
    ("portable", 2): (
        (16, Tile(16, 128, 64, 4, 3, fill=2.0)),
        (128, Tile(64, 128, 32, 4, 3, fill=2.0)),
        (_ANY, Tile(128, 128, 32, 8, 3, group=16)),
    ),
    ("portable", 4): ((64, Tile(32, 128, 32, 4, 2, fill=2.0)), (_ANY, Tile(64, 64, 16, 4, 3, group=16))),
    ("interpreter", 2): ((64, Tile(64, 128, 128, 4, 1, fill=1.0)), (_ANY, Tile(128, 128, 128, 4, 1, paired=True))),
    ("interpreter", 4): ((64, Tile(64, 128, 128, 4, 1, fill=1.0)), (_ANY, Tile(128, 128, 128, 4, 1, paired=True))),
}

# Φ̂ᵀΦ̂, lower tiles: (at most this D, tile). The wider tile reads a quarter less; at D = 4096 its 272 tiles are 2.06
# waves of 132, so those beyond the second are cut (measured: 468 µs for 16,384 rows, 502 with 128×128 tiles). From 8192
# on there are waves enough.
_GRAM: _Table = {
    ("sm90", 2): (
        (2048, Tile(128, 128, 64, 4, 4)),
        (6144, Tile(128, 256, 64, 8, 4, tail=True)),
        (_ANY, Tile(128, 256, 64, 8, 4)),
    ),
    ("sm90", 4): ((_ANY, Tile(64, 64, 32, 4, 3)),),
    ("sm80", 2): ((_ANY, Tile(128, 128, 64, 8, 3)),),
    ("sm80", 4): ((_ANY, Tile(64, 64, 32, 4, 3)),),
    ("portable", 2): ((_ANY, Tile(128, 128, 32, 8, 3)),),
    ("portable", 4): ((_ANY, Tile(64, 64, 32, 4, 2)),),
    ("interpreter", 2): ((_ANY, Tile(128, 256, 128, 4, 1)),),
    ("interpreter", 4): ((_ANY, Tile(128, 256, 128, 4, 1)),),
}
# Blackwell's data-centre parts have Hopper's shared memory and more. What was measured on Hopper alone says nothing of
# them, and one of its tiles spills there: those rows are what they were before.
_ON_BLACKWELL: dict[str, dict[float, Tile]] = {
    "project": {
        64: Tile(64, 128, 64, 4, 5, fill=1.0),
        128: Tile(128, 128, 64, 8, 4, fill=1.0),
        256: Tile(128, 256, 64, 8, 4, fill=1.0),
    },
    "product": {
        64: Tile(64, 128, 64, 4, 5, fill=1.25),
        128: Tile(128, 128, 64, 8, 3, fill=1.25),
        256: Tile(128, 128, 64, 8, 3, fill=2.25),
        1024: Tile(128, 128, 64, 8, 4, group=32, paired=True),
    },
    "gram": {6144: Tile(128, 128, 64, 4, 4)},
}
for _name, _table in (("project", _PROJECT), ("product", _PRODUCT), ("gram", _GRAM)):
    _table["sm100", 2] = tuple(sorted((dict(_table["sm90", 2]) | _ON_BLACKWELL[_name]).items()))
    _table["sm100", 4] = _table["sm90", 4]


@contextmanager
def forms(**chosen: str) -> Iterator[None]:
    """Other :data:`FORMS` for a while, to hold them side by side. For the whole process."""
    assert all(form in CHOICES[name] for name, form in chosen.items()), chosen
    before = {name: FORMS[name] for name in chosen}
    FORMS.update(chosen)
    try:
        yield
    finally:
        FORMS.update(before)


def device(of: torch.device) -> Device:
    """The table's name for a torch device. Unknown GPUs, and those with little shared memory, are ``portable``."""
    if of.type != "cuda":
        return Device("interpreter", 4)
    properties = torch.cuda.get_device_properties(of)
    kinds = {(8, 0): "sm80", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}
    kind = "portable" if torch.version.hip else kinds.get((properties.major, properties.minor), "portable")
    return Device(kind, properties.multi_processor_count)


def project(on: Device, element: int, rows: int) -> Tile:
    """The tile of x weightᵀ with ``rows`` rows of x, for operands of ``element`` bytes."""
    return _read(_PROJECT, on, element, rows)


def product(on: Device, element: int, rows: int) -> Tile:
    """The tile of the triangular product with ``rows`` rows of c."""
    return _read(_PRODUCT, on, element, rows)


def gram(on: Device, element: int, size: int) -> Tile:
    """The tile of the Gram matrix of ``size`` features."""
    return _read(_GRAM, on, element, size)


def power(on: Device, width: int, rows: int) -> tuple[int, int]:
    """Rows of W a program of power iteration holds at once, and its warps; ``width`` is h as a power of two."""
    held = max(1, min(16, 16384 // width))
    while held > 1 and rows < held * on.multiprocessors:
        held //= 2
    return held, max(4, min(16, held * width // 1024))


def splits(tile: Tile, on: Device, tiles: int, steps: int) -> int:
    """Into how many pieces to cut a reduction of ``steps`` steps that ``tiles`` output tiles share."""
    return max(1, min(int(tile.fill * on.multiprocessors) // tiles, steps // _MIN_STEPS))


def cuts(tile: Tile, on: Device, tiles: int, steps: int) -> tuple[int, int]:
    """How many of ``tiles`` equally long tiles stay whole, and into how many pieces each of the others is cut.

    A whole tile has a multiprocessor to itself, so ``tiles`` of them take ⌈tiles / multiprocessors⌉ waves.
    """
    if not tile.tail:
        pieces = splits(tile, on, tiles, steps)
        return (tiles, 1) if pieces == 1 else (0, pieces)
    rest = tiles % on.multiprocessors
    pieces = 1 if rest == 0 else min(on.multiprocessors // rest, steps // _MIN_STEPS)
    return (tiles, 1) if pieces <= 1 else (tiles - rest, pieces)


def span(tile: Tile, on: Device, tiles: int, row_tiles: int) -> int:
    """Tiles of U in one piece of work: the least power of two that keeps to ``fill`` programs a multiprocessor."""
    length = 1
    while length < tiles:
        blocks = -(-tiles // length)
        if row_tiles * length * blocks * (blocks + 1) // 2 <= tile.fill * on.multiprocessors:
            break
        length *= 2
    return length


def _read(table: _Table, on: Device, element: int, size: int) -> Tile:
    return next(tile for limit, tile in table[on.kind, element] if size <= limit)
