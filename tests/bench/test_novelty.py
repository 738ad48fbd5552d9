"""The likelihood that decides whether novelty belongs into u."""

from __future__ import annotations

import torch

from rmcore.bench.novelty import held_out_weights
from rmcore.head import HeadConfig


def test_more_freedom_never_fits_worse_and_nothing_is_fitted_to_what_was_seen(make_data):
    data = make_data(rows=60, pairs=80, dtype=torch.float32)
    config = HeadConfig(16, num_features=32)
    found = held_out_weights(config, data.hidden, data.labels, data.pairs, seed=0)
    served, novelty, alone, both = found.values()
    assert both[0] <= min(served[0], novelty[0], alone[0])
    assert novelty[0] <= served[0]
    assert served[2] == alone[1] == 0
    # Labels that follow no rule: held out, the less that is said the better.
    noise = torch.randint(0, 2, (80,), generator=torch.Generator().manual_seed(0)).float()
    found = held_out_weights(config, data.hidden, noise, data.pairs, seed=0)
    assert max(found["both fitted"][1:]) > 1
