"""How many processes: what cannot be is refused by name."""

from __future__ import annotations

import pytest

from rmcore._base.errors import InputError
from rmcore.integrations.ray.serve import ServeScale


def test_what_cannot_be_is_refused():
    assert ServeScale(2, 3).most == 3
    assert ServeScale(2).most == 2
    for name, value in (
        ("replicas", 0),
        ("max_replicas", 0),
        ("entries", 0),
        ("assemblers", 0),
        ("batches", 0.0),
        ("upscale_delay_s", -1.0),
        ("downscale_delay_s", float("nan")),
        ("num_cpus", -1.0),
        ("num_gpus", -0.5),
        ("overhead_cpus", -0.1),
    ):
        with pytest.raises(InputError, match=name):
            ServeScale(**{name: value})
