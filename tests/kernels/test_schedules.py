"""How the tables cut work: every step of every tile once, and as few waves as claimed. Arithmetic alone, no Triton."""

from __future__ import annotations

import heapq
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore.kernels import heuristics, heuristics_tma
from rmcore.kernels.heuristics import Device, Tile


def programs(whole: int, cut: int, tiles: int, steps: int) -> list[tuple[int, range]]:
    """(tile, its steps) of each program, as gram_kernel derives them from its number."""
    every, found = math.ceil(steps / cut), []
    for program in range(whole + (tiles - whole) * cut):
        late = max(program - whole, 0)
        start = late % cut * every
        stop = steps if program < whole else min(start + every, steps)
        found.append((min(program, whole) + late // cut, range(start, stop)))
    return found


def waves(lengths: list[int], multiprocessors: int, longest: int) -> float:
    """Time until all programs are done, in tiles: each goes to the multiprocessor that is free first."""
    free = [0] * multiprocessors
    for length in lengths:
        heapq.heapreplace(free, free[0] + length)
    return max(free) / longest


@given(
    tiles=st.integers(1, 700),
    steps=st.integers(1, 300),
    multiprocessors=st.sampled_from([1, 4, 108, 132, 148]),
    tail=st.booleans(),
    fill=st.sampled_from([0.0, 1.0, 2.25]),
)
def test_every_step_of_every_tile_is_taken_once(tiles, steps, multiprocessors, tail, fill):
    whole, cut = heuristics.cuts(
        Tile(1, 1, 1, 1, 1, fill=fill, tail=tail), Device("sm90", multiprocessors), tiles, steps
    )
    taken: dict[int, list[int]] = {}
    for tile, part in programs(whole, cut, tiles, steps):
        taken.setdefault(tile, []).extend(part)
    assert sorted(taken) == list(range(tiles))
    assert all(part == list(range(steps)) for part in taken.values())  # in the order in which pieces are added, too


@pytest.mark.parametrize(
    ("size", "rows", "cols", "tail", "most"),
    [
        (4096, 128, 256, False, 3.0),  # 272 tiles: 2.06 waves, of which the third has 8 programs
        (4096, 128, 256, True, 2.07),
        (4096, 128, 128, False, 4.0),  # 528 tiles of half the size: the table's
        (8192, 128, 256, True, 8.1),  # 1056: whole waves, nothing to cut
        (5120, 128, 256, True, 3.4),
    ],
)
def test_gram_tiles_on_an_h100_take_this_many_waves(size, rows, cols, tail, most):
    share, blocks, steps = cols // rows, math.ceil(size / cols), 256
    tiles = share * blocks * (blocks + 1) // 2
    whole, cut = heuristics.cuts(Tile(rows, cols, 64, 8, 4, tail=tail), Device("sm90", 132), tiles, steps)
    parts = [len(part) for _, part in programs(whole, cut, tiles, steps)]
    assert waves(parts, 132, steps) <= most
    assert waves(parts, 132, steps) > most - 0.9


def dealt(total: int, programs: int) -> list[list[int]]:
    """The tasks of each program, as variance_tma.py deals them out: back and forth."""
    hands: list[list[int]] = [[] for _ in range(programs)]
    for turn in range(math.ceil(total / programs)):
        for program in range(programs):
            task = turn * programs + (program if turn % 2 == 0 else programs - 1 - program)
            if task < total:
                hands[program].append(task)
    return hands


@given(total=st.integers(1, 3000), multiprocessors=st.sampled_from([1, 3, 132]))
def test_every_tile_of_the_triangle_is_dealt_once_and_only_a_last_turn_is_left_out(total, multiprocessors):
    programs = heuristics_tma.programs(total, Device("sm90", multiprocessors))
    hands = dealt(total, programs)
    assert sorted(task for hand in hands for task in hand) == list(range(total))
    assert {len(hand) for hand in hands} <= {math.ceil(total / programs), math.ceil(total / programs) - 1}
    assert all(hands)


@pytest.mark.parametrize("form", heuristics_tma.FORMS)
@pytest.mark.parametrize(("rows", "most"), [(512, 1.01), (1024, 1.01), (2048, 1.01), (4096, 1.01), (4095, 1.01)])
def test_all_programs_come_to_the_same_number_of_steps_on_an_h100(form, rows, most):
    """D = 4096: the longest of 132 programs against an even share. The hardware's own order takes up to 1.02."""
    device, tiles = Device("sm90", 132), 32
    tile = heuristics_tma.product(form, device, rows)
    tiles_m = math.ceil(rows / tile.rows)
    hands = dealt(tiles_m * tiles, heuristics_tma.programs(tiles_m * tiles, device))
    steps = [sum(tiles - task // tiles_m for task in hand) for hand in hands]
    assert max(steps) <= most * sum(steps) / 132
