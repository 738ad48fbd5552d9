"""The public streams and mixtures that routers are measured on: their pairs, and what a head says of them.

Needs the data folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmcore._base.prompt import canonical_response, text_length
from rmcore.cli.run_demo import demo_backbone
from rmcore.engine.routing import Candidates
from rmcore.evaluation.evaluate import PairStates, encode_pairs, recorded_preference
from rmcore.evaluation.streams import StreamPair, load_corpus, load_test_pairs
from rmcore.head import FrozenHead
from rmcore.model.error_prior import ErrorPrior, row_distance
from rmcore.model.training_pairs import encode_preferences

__all__ = ["MIXES", "RECORDED", "Mixed", "Part", "candidates_of", "joined", "load", "mixed"]

HH_PAIRS = 600
"""Of hh-rlhf's harmless-base, drawn once."""
MIXES = (
    *(("id",), ("llmbar",), ("xstest",), ("pandalm",), ("hh",)),
    *(("id", "llmbar"), ("id", "xstest"), ("id", "pandalm"), ("id", "hh")),
    *(("llmbar", "pandalm"), ("pandalm", "hh")),
)
RECORDED = {"llmbar": "GPT-4", "pandalm": "gpt-3.5-turbo"}


@dataclass(frozen=True)
class Part:
    """Test pairs of one source: what is known of them whatever the head."""

    states: PairStates
    ratio: Tensor
    label: Tensor
    """(N,) ±1, 1 where the first response is better."""
    recorded: Tensor
    """(N,) a recorded judge's preference; NaN where there is none."""
    prompts: tuple[str, ...]


def part_of(states: PairStates, pairs: Sequence[StreamPair]) -> Part:
    """A part from its pairs and their states."""
    size = torch.tensor([[text_length(canonical_response(text)) for text in (p.first, p.second)] for p in pairs])
    logs = size.double().log1p()
    return Part(
        states,
        logs[:, 0] - logs[:, 1],
        torch.tensor([1.0 if p.label > 0.5 else -1.0 for p in pairs]).double(),
        torch.tensor([recorded_preference(p) for p in pairs]).double(),
        tuple(str(p.prompt) for p in pairs),
    )


def candidates_of(head: FrozenHead, prior: ErrorPrior, part: Part) -> Candidates:
    """What a router is told of a part's pairs."""
    rows = part.states.hidden.flatten(0, 1)
    sizes = torch.full((len(part.label),), 2, dtype=torch.int64)
    scores = head.score_pairs(rows, sizes, dtype=torch.float64, novelty=True)
    assert prior.sketch is not None
    assert scores.novelty is not None
    hidden = part.states.hidden
    columns = {
        "novelty": scores.novelty.double(),
        "distance": row_distance(rows, prior.sketch).double().view(-1, 2).mean(1),
        "log_length_ratio": part.ratio,
        "apart": (hidden[:, 0] - hidden[:, 1]).double().norm(dim=1),
        "length": part.ratio.abs(),
    }
    return Candidates(scores.logit, scores.variance, scores.uncertainty, columns)


def joined(some: Sequence[Candidates]) -> Candidates:
    """Candidates of several parts as one."""
    columns = {name: torch.cat([one.columns[name] for one in some]) for name in some[0].columns}
    logit, variance, uncertainty = (
        torch.cat([getattr(one, name) for one in some]) for name in ("logit", "variance", "uncertainty")
    )
    return Candidates(logit, variance, uncertainty, columns)


@dataclass(frozen=True)
class Mixed:
    """A stream in its order: parts of equal size, drawn and shuffled by a seed."""

    candidates: Candidates
    label: Tensor
    """(N,) ±1."""
    recorded: Tensor
    """(N,) the recorded judge's preference where the part has one (NaN: no verdict), the label elsewhere."""
    prompts: list[str]


def mixed(mix: tuple[str, ...], parts: dict[str, Part], known: dict[str, Candidates], seed: int) -> Mixed:
    """The stream of one mixture for a seed."""
    rng = np.random.default_rng([seed, *map(ord, "+".join(mix))])
    size = min(len(parts[part].label) for part in mix)
    drawn = {part: torch.from_numpy(rng.permutation(len(parts[part].label))[:size]) for part in mix}
    order = torch.from_numpy(rng.permutation(size * len(mix)))
    label = torch.cat([parts[part].label[rows] for part, rows in drawn.items()])[order]
    recorded = torch.cat([parts[part].recorded[rows] for part, rows in drawn.items()])[order]
    has = torch.cat([torch.full((size,), part in RECORDED) for part in mix])[order]
    prompts = [parts[part].prompts[k] for part, rows in drawn.items() for k in rows.tolist()]
    return Mixed(
        joined([known[part][rows] for part, rows in drawn.items()])[order],
        label,
        torch.where(has, recorded, label),
        [prompts[k] for k in order.tolist()],
    )


def load(data: Path) -> tuple[Any, tuple[Tensor, Tensor, Tensor], dict[str, Part]]:
    """The corpus, its training states, and all parts encoded through the cache of states."""
    corpus = load_corpus(data)
    backbone = demo_backbone()
    backbone.use_state_cache()
    hidden, labels, pairs = encode_preferences(backbone, corpus.train, "difference")
    assert pairs is not None
    sources = dict(corpus.parts) | {"pandalm": load_test_pairs(data, "pandalm")}
    harmless = load_test_pairs(data, "hh_harmless")
    drawn = np.random.default_rng(0).permutation(len(harmless))[:HH_PAIRS]
    sources["hh"] = tuple(harmless[k] for k in drawn)
    parts = {name: part_of(encode_pairs(backbone, some, "difference"), some) for name, some in sources.items()}
    return corpus, (hidden, labels, pairs), parts
