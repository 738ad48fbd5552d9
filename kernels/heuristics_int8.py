"""What to launch for int8 heads: the tables of heuristics.py for whole numbers, a file of their own so that what was
measured of the 16-bit kernels stays theirs.

No row is measured: each is the 16-bit row with twice the depth, which moves the same bytes a step, and where that does
not fit or serialises, what compiles without spills (``make triton-gate``). Two terms of a row take two accumulators, so
their tiles are half as wide.
"""

from .heuristics import Device, Tile

__all__ = ["product", "project"]

_Table = dict[str, tuple[tuple[float, Tile], ...]]
_ANY = float("inf")

# x weightᵀ, one term: kind → rows (at most this many rows of x, tile)
_PROJECT: _Table = {
    "sm90": (
        (16, Tile(16, 32, 512, 4, 4, fill=1.0)),
        (32, Tile(32, 32, 512, 4, 3, fill=1.0)),
        (128, Tile(64, 64, 256, 4, 4, fill=1.0)),
        (256, Tile(64, 64, 128, 4, 5)),
        (_ANY, Tile(128, 256, 128, 8, 4, fill=1.0)),
    ),
    "sm80": (
        (16, Tile(16, 32, 512, 4, 4, fill=1.0)),
        (32, Tile(32, 64, 128, 4, 5, fill=1.0)),
        (64, Tile(64, 128, 128, 4, 4, fill=1.0)),
        (512, Tile(128, 128, 128, 8, 3, fill=1.0)),
        (_ANY, Tile(128, 128, 128, 8, 4)),
    ),
    "portable": (
        (16, Tile(16, 32, 256, 4, 4, fill=2.0)),
        (64, Tile(64, 64, 128, 4, 3, fill=2.0)),
        (_ANY, Tile(128, 128, 64, 8, 3)),
    ),
    "interpreter": ((64, Tile(64, 128, 128, 4, 1, fill=1.0)), (_ANY, Tile(128, 256, 128, 4, 1))),
}
_TWO_TERMS: _Table = {
    "sm90": (
        (16, Tile(16, 32, 512, 4, 4, fill=1.0)),
        (32, Tile(32, 32, 256, 4, 4, fill=1.0)),
        (256, Tile(64, 64, 128, 4, 5, fill=1.0)),
        (_ANY, Tile(64, 128, 128, 4, 4)),
    ),
    "sm80": (
        (16, Tile(16, 32, 256, 4, 4, fill=1.0)),
        (64, Tile(32, 64, 128, 4, 4, fill=1.0)),
        (_ANY, Tile(128, 64, 128, 8, 3)),
    ),
    "portable": (
        (16, Tile(16, 32, 128, 4, 4, fill=2.0)),
        (64, Tile(32, 64, 128, 4, 3, fill=2.0)),
        (_ANY, Tile(64, 64, 128, 4, 3)),
    ),
    "interpreter": ((64, Tile(64, 128, 128, 4, 1, fill=1.0)), (_ANY, Tile(128, 128, 128, 4, 1))),
}

# U c over the triangle. Where ``fill`` > 0, cols is 128, the edge of U's packed tiles; no step is deeper than it.
_PRODUCT: _Table = {
    "sm90": (
        (16, Tile(16, 128, 128, 4, 6, fill=1.25)),
        (32, Tile(32, 128, 128, 4, 6, fill=1.25)),
        (128, Tile(64, 32, 128, 4, 6, group=32, paired=True)),
        (256, Tile(64, 128, 128, 4, 5, group=32, paired=True)),
        (1024, Tile(128, 128, 128, 4, 4, group=32, paired=True)),
        (_ANY, Tile(128, 256, 128, 8, 4, group=32)),
    ),
    "sm80": (
        (16, Tile(16, 128, 128, 4, 4, fill=1.25)),
        (64, Tile(64, 128, 64, 4, 5, fill=1.25)),
        (256, Tile(128, 128, 64, 8, 4, fill=2.25)),
        (1024, Tile(128, 128, 128, 8, 4, group=32, paired=True)),
        (_ANY, Tile(128, 128, 128, 8, 4, group=32)),
    ),
    "portable": (
        (16, Tile(16, 128, 128, 4, 3, fill=2.0)),
        (128, Tile(64, 128, 64, 4, 3, fill=2.0)),
        (_ANY, Tile(128, 128, 64, 8, 3, group=16)),
    ),
    "interpreter": ((64, Tile(64, 128, 128, 4, 1, fill=1.0)), (_ANY, Tile(128, 128, 128, 4, 1, paired=True))),
}
for _table in (_PROJECT, _TWO_TERMS, _PRODUCT):
    _table["sm100"] = _table["sm90"]
# Triton 3.6 has no tcgen05 for bytes: with mma the sums of these tiles spill there unless they are whole, and 8 warps'.
# So do both terms' sums of the widest tile, with any Triton.
_PROJECT["sm100"] = (*_PROJECT["sm90"][:-1], (_ANY, Tile(128, 256, 128, 8, 4)))
_PRODUCT["sm100"] = tuple(
    (limit, tile._replace(warps=8) if limit == 1024 else tile) for limit, tile in _PRODUCT["sm90"]
)
_TWO_TERMS["sm100"] = (*_TWO_TERMS["sm90"][:-1], (_ANY, Tile(64, 64, 128, 4, 5)))


def project(on: Device, rows: int, two_terms: bool) -> Tile:
    """The tile of x weightᵀ with ``rows`` rows of x."""
    return _read(_TWO_TERMS if two_terms else _PROJECT, on, rows)


def product(on: Device, rows: int) -> Tile:
    """The tile of the triangular product with ``rows`` rows of c."""
    return _read(_PRODUCT, on, rows)


def _read(table: _Table, on: Device, rows: int) -> Tile:
    return next(tile for limit, tile in table[on.kind] if rows <= limit)
