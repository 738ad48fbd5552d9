"""What to launch of the persistent forms: tiles, and how many programs share them.

No row is measured. Each is what compiles without a spilled byte in the loop over the reduction, and with matrix
instructions that overlap, under Triton 3.6.0 and the newest (``make triton-gate``):

- ``persistent``: 8 warps take one tile together, the loop over tiles and the loop over the reduction are one, and so
  the loads of the next tile are on their way while a tile is finished. Shared memory holds 4 stages and what the end
  of a tile needs to turn its sums into rows.
- ``specialized``: ``warps`` are those of one consumer. Triton gives a tile of 128 rows or more two of them, each half
  of its rows, beside a producer that does nothing but ask for loads, a ring of ``stages`` ahead: 384 threads.

Tiles of 256×128 and 128×256 read 48 B a clock from the L2 at full matrix rate, 128×128 reads 64. Triton has no
multicast between programs: neighbours in the order share operands through the L2 alone.
"""

from .heuristics import Device, Tile

__all__ = ["FORMS", "KINDS", "STRIP_ROWS", "gram", "product", "programs", "project"]

FORMS = ("persistent", "specialized")
KINDS = ("sm90", "interpreter")
"""Devices with tables. Blackwell's matrix instructions take their sums to a memory of their own: tables of its own."""
STRIP_ROWS = 4096
"""Rows of c that a launch of the triangular product takes at most: 33 MB at D = 4096, which the L2 keeps."""

_Table = dict[tuple[str, str], tuple[tuple[float, Tile], ...]]
_ANY = float("inf")

# x weightᵀ: (form, kind) → rows (at most this many rows of x, tile)
_PROJECT: _Table = {
    ("persistent", "sm90"): ((512, Tile(128, 128, 64, 8, 4)), (_ANY, Tile(128, 256, 64, 8, 4))),
    ("specialized", "sm90"): ((512, Tile(128, 128, 64, 4, 4)), (_ANY, Tile(128, 256, 64, 4, 3))),
}
# U c: cols is 128, the edge of U's packed tiles.
_PRODUCT: _Table = {
    ("persistent", "sm90"): (
        (512, Tile(64, 128, 64, 4, 5)),
        (1024, Tile(128, 128, 64, 8, 4)),
        (_ANY, Tile(256, 128, 64, 8, 4)),
    ),
    ("specialized", "sm90"): (
        (512, Tile(64, 128, 64, 4, 5)),  # persistent: tiles of 128 rows would be one wave, as long as its longest
        (1024, Tile(128, 128, 64, 4, 5)),
        (_ANY, Tile(256, 128, 64, 4, 4)),
    ),
}
# Φ̂ᵀΦ̂, lower tiles: (at most this D, tile)
_GRAM: _Table = {
    ("persistent", "sm90"): (
        (2048, Tile(128, 128, 64, 8, 4)),
        (6144, Tile(128, 256, 64, 8, 4, tail=True)),
        (_ANY, Tile(128, 256, 64, 8, 4)),
    ),
    ("specialized", "sm90"): (
        (2048, Tile(128, 128, 64, 4, 4)),
        (6144, Tile(128, 256, 64, 4, 2, tail=True)),
        (_ANY, Tile(128, 256, 64, 4, 2)),
    ),
}
for _form in FORMS:
    _PROJECT[_form, "interpreter"] = ((64, Tile(64, 128, 64, 4, 1)), (_ANY, Tile(128, 256, 128, 4, 1)))
    _PRODUCT[_form, "interpreter"] = ((64, Tile(64, 128, 64, 4, 1)), (_ANY, Tile(128, 128, 128, 4, 1)))
    _GRAM[_form, "interpreter"] = ((_ANY, Tile(128, 256, 128, 4, 1, tail=True)),)


def project(form: str, on: Device, rows: int, *, even: bool) -> Tile:
    """The tile of x weightᵀ with ``rows`` rows of x; ``even``: both sizes of the weight are multiples of 16.

    Where they are not, Triton 3.6 keeps eight bytes of the wide persistent tile aside: a narrower one serves.
    """
    tile = _read(_PROJECT, form, on, rows)
    return tile if even or form == "specialized" else tile._replace(cols=min(tile.cols, 128))


def product(form: str, on: Device, rows: int) -> Tile:
    """The tile of the triangular product with ``rows`` rows of c."""
    return _read(_PRODUCT, form, on, rows)


def gram(form: str, on: Device, size: int) -> Tile:
    """The tile of the Gram matrix of ``size`` features."""
    return _read(_GRAM, form, on, size)


def programs(total: int, on: Device) -> int:
    """How many programs take ``total`` tiles between them: one a multiprocessor, each of which takes several."""
    return min(total, on.multiprocessors)


def _read(table: _Table, form: str, on: Device, size: int) -> Tile:
    return next(tile for limit, tile in table[form, on.kind] if size <= limit)
