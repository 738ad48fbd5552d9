"""The packed triangular factor: 128-tiles of the lower triangle."""

from __future__ import annotations

import pytest
import torch

from rmcore.ops import reference


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 255, 256, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_pack_and_unpack_are_inverse(size, dtype):
    generator = torch.Generator().manual_seed(size)
    lower = torch.randn(size, size, generator=generator, dtype=torch.float64).to(dtype).tril()
    tiles = reference.pack_lower(lower)
    n = -(-size // 128)
    assert tiles.shape == (n * (n + 1) // 2, 128, 128)
    assert tiles.dtype == dtype
    assert tiles.is_contiguous()
    back = reference.unpack_lower(tiles, size)
    assert back.is_contiguous()
    assert torch.equal(back, lower)


def test_what_is_above_the_diagonal_is_not_read():
    full = torch.full((200, 200), float("nan"))
    full = torch.where(torch.ones(200, 200).tril() > 0, torch.arange(40000.0).view(200, 200), full)
    tiles = reference.pack_lower(full)
    assert bool(tiles.isfinite().all())
    assert torch.equal(reference.unpack_lower(tiles, 200), full.nan_to_num(0).tril())


def test_tiles_are_in_row_order_and_padding_is_zero():
    lower = torch.ones(300, 300).tril()
    tiles = reference.pack_lower(lower)
    assert torch.equal(tiles[3 * 2 // 2 + 1][:44], lower[256:300, 128:256])  # tile (2, 1) is at 2·3/2 + 1
    assert not tiles[3][44:].any()  # rows past 300
    assert not tiles[5][:, 44:].any()  # columns past 300
    assert float(tiles.sum()) == float(lower.sum())


@pytest.mark.parametrize("tile", [1, 3, 8])
def test_other_tiles_work(tile):
    lower = torch.randn(10, 10).tril()
    assert torch.equal(reference.unpack_lower(reference.pack_lower(lower, tile), 10), lower)
