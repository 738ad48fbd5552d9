"""What a fit does with the data of several ranks, each of which holds a part: sums, samples, and one head for all.

The order of the data is that of one process that has rank 0's first, then rank 1's, and so on; a part may be empty.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.head import checkpoint
from rmcore.head.config import HeadConfig
from rmcore.head.frozen import FrozenHead
from rmcore.head.ranks import Ranks
from rmcore.head.sngp import SNGPHead
from rmcore.ops import reference
from rmcore.ops.quantize import ColumnRange
from rmcore.ops.weights import FeatureMap

__all__ = [
    "check_alike",
    "one_feature_map",
    "one_head",
    "one_layer",
    "one_length_scale",
    "sampled_pairs",
    "sampled_rows",
    "summed_columns",
]


def check_alike(config: HeadConfig, ranks: Ranks) -> None:
    """Raise InputError on every rank where they were given different configurations."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).digest()
    told = ranks.each(torch.tensor(list(digest), dtype=torch.float64))
    others = [r for r in range(ranks.size) if not torch.equal(told[r], told[0])]
    if others:
        reject("head.config", f"another on ranks {others} than on rank 0", "the same on all")


def sampled_rows(hidden: Tensor, most: int, ranks: Ranks) -> Tensor:
    """At most ``most`` of all ranks' rows (R, h), on every rank: those that ``reference.median_rows`` names."""
    counts = ranks.counts(len(hidden))
    chosen = reference.median_rows(sum(counts), max_rows=most)
    start = sum(counts[: ranks.rank])
    mine = (chosen >= start) & (chosen < start + len(hidden))
    return ranks.rows(hidden[(chosen[mine] - start).to(hidden.device)], mine.nonzero()[:, 0], len(chosen))


def one_length_scale(head: SNGPHead, hidden: Tensor, ranks: Ranks | None) -> None:
    """Set a head's length-scale by the median rule over the rows (R, h) of all ranks, those one process would take."""
    head.set_length_scale(hidden if ranks is None else sampled_rows(hidden, reference.MEDIAN_ROWS, ranks))


def summed_columns(hidden: Tensor, ranks: Ranks) -> ColumnRange:
    """The range of the columns of all ranks' rows (R, h), of which there is at least one."""
    mine = torch.zeros(3 * hidden.shape[1] + 1, dtype=torch.float64, device=hidden.device)
    if len(hidden):
        sums = hidden.sum(0, dtype=torch.float64)
        count = sums.new_tensor([len(hidden)])
        mine = torch.cat([sums, hidden.amin(0).double(), hidden.amax(0).double(), count])
    told = ranks.each(mine).to(hidden.device)
    told = told[told[:, -1] > 0]
    sums, lows, highs = told[:, :-1].chunk(3, dim=1)
    return ColumnRange(sums.sum(0) / told[:, -1].sum(), lows.amin(0).to(hidden), highs.amax(0).to(hidden))


def one_feature_map(head: SNGPHead, dtype: torch.dtype | None, hidden: Tensor, ranks: Ranks | None) -> FeatureMap:
    """The frozen features of rank 0, calibrated on the rows (R, h) of all: the same bits on every rank."""
    if ranks is None:
        return head.freeze_features(dtype, calibration=hidden)
    columns = summed_columns(hidden, ranks)
    feature_map = head.freeze_features(dtype, calibration=columns)
    told = ranks.share(
        feature_map.tensors(),
        {
            "dtype": str(feature_map.dtype).removeprefix("torch."),
            "input_scale": feature_map.input_scale,
            "length_scale": float(head.length_scale) if head.config.features == "rff" else None,
        },
    )
    if told.values["length_scale"] is not None:
        head.length_scale.fill_(told.values["length_scale"])
    return replace(
        feature_map,
        dtype=getattr(torch, told.values["dtype"]),
        input_scale=told.values["input_scale"],
        **{name: tensor.to(hidden.device) for name, tensor in told.tensors.items()},  # type: ignore[arg-type]
    )


@torch.no_grad()
def one_layer(head: SNGPHead, ranks: Ranks | None) -> None:
    """Give every rank's head what rank 0's has learned, or begins with."""
    if ranks is None:
        return
    learned: dict[str, Tensor] = dict(head.named_parameters())
    learned |= {"right_vector": head.right_vector, "length_scale": head.length_scale}
    told = ranks.share(learned).tensors
    for name, tensor in learned.items():
        tensor.copy_(told[name])


def one_head(made: Callable[[], FrozenHead], ranks: Ranks | None) -> FrozenHead:
    """The head that ``made`` makes on rank 0, bit for bit, on every rank."""
    if ranks is None or ranks.rank == 0:
        head = made()
        if ranks is not None:
            ranks.share(*checkpoint.head_state(head))
        return head
    return checkpoint.head_of_state(*ranks.share())


def sampled_pairs(
    hidden: Tensor,
    labels: Tensor,
    pairs: Tensor | None,
    columns: Tensor,
    most: int,
    ranks: Ranks,
    *,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """At most ``most`` pairs of all ranks', on every rank and in random order, for what one process does with a few.

    Args:
        hidden: this rank's rows; in concat mode 2k and 2k + 1 are the two orders of pair k.
        labels: (N,), or (2N,) in concat mode.
        pairs: (N, 2) rows, or None in concat mode.
        columns: (N, c) further numbers of each pair.
        most: how many.
        ranks: all of which call this.
        seed: of the order, which is the first part of ``torch.randperm`` over all pairs.

    Returns:
        Rows (2n, h), labels, pairs or None, and columns of n pairs.
    """
    width, count = hidden.shape[1], len(columns)
    counts = ranks.counts(count)
    chosen = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed))[:most]
    start = sum(counts[: ranks.rank])
    mine = (chosen >= start) & (chosen < start + count)
    own = (chosen[mine] - start).to(hidden.device)
    orders = 1 if pairs is not None else 2
    rows = (hidden.view(-1, 2, width) if pairs is None else hidden[pairs])[own].reshape(len(own), 2 * width)
    told = [rows, labels.view(-1, orders)[own], columns.to(hidden.device)[own]]
    flat = ranks.rows(torch.cat([part.double() for part in told], dim=1), mine.nonzero()[:, 0], len(chosen))
    rows, labels_of, others = flat.split([2 * width, orders, columns.shape[1]], dim=1)
    where = None if pairs is None else torch.arange(2 * len(chosen), device=hidden.device).view(-1, 2)
    return rows.reshape(-1, width).to(hidden), labels_of.flatten().to(labels), where, others.to(columns)
