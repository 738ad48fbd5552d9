"""The streams that learning is measured on, encoded once, with what people and the judge said of their pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from rmcore.cli.run_demo import demo_backbone
from rmcore.evaluation.evaluate import encode_pairs
from rmcore.evaluation.streams import StreamPair, load_corpus
from rmcore.model.data import read_lines
from rmcore.model.training_pairs import encode_preferences

__all__ = ["Material", "encode_streams", "material_of", "read_streams"]

SECOND_STREAM_PAIRS = 400
"""Taken from each of its two parts."""


@dataclass(frozen=True)
class Material:
    """A stream, encoded once, with what the human and the judge said."""

    rows: Tensor
    """(N, 2, h), the stream's."""
    truth: np.ndarray
    """(N,) +1 where the first response is better, −1 where the second is."""
    judged: dict[str, np.ndarray]
    """(N,) by judge: its preference in [−1, 1], NaN for no verdict."""
    flipped: dict[str, np.ndarray]


def read_streams(data: Path) -> dict[str, list[StreamPair]]:
    """The mixed stream, and one of human pairs where the head is not wrong but ignorant."""
    corpus = load_corpus(data)
    second = []
    for name in ("pandalm", "hh_harmless"):
        rows = [row for _, row in read_lines(data / f"{name}.jsonl.gz")]
        for k in np.random.default_rng(0).permutation(len(rows))[:SECOND_STREAM_PAIRS]:
            pair = StreamPair(rows[k]["prompt"], rows[k]["chosen"], rows[k]["rejected"], 1.0, name)
            second.append(pair if k % 2 else pair.swapped())
    return {"mixed": [pair for part in corpus.parts.values() for pair in part], "second": second}


def encode_streams(data: Path, cache: Path | None) -> dict[str, Tensor]:
    """Hidden rows of the training pairs and of both streams, from the cache where there is one."""
    from safetensors.torch import load_file, save_file

    if cache is not None and cache.is_file():
        return load_file(cache)
    backbone = demo_backbone()
    hidden, labels, pairs = encode_preferences(backbone, load_corpus(data).train, "difference")
    assert pairs is not None
    tensors = {"train": hidden, "labels": labels, "pairs": pairs}
    for name, stream in read_streams(data).items():
        tensors[name] = encode_pairs(backbone, stream, "difference").hidden.contiguous()
    if cache is not None:
        save_file(tensors, cache)
    return tensors


def material_of(stream: list[StreamPair], rows: Tensor) -> Material:
    """A stream with its rows (N, 2, h), what people said of it, and what GPT-4 did where it was asked."""
    truth = np.array([1.0 if pair.label > 0.5 else -1.0 for pair in stream])
    recorded = np.array([_recorded(pair) for pair in stream])
    return Material(
        rows=rows,
        truth=truth,
        judged={"label": truth, "gpt-4": np.where(recorded[:, 2] > 0, recorded[:, 0], truth)},
        flipped={"label": np.zeros(len(stream), dtype=bool), "gpt-4": recorded[:, 1] > 0},
    )


def _recorded(pair: StreamPair) -> tuple[float, bool, bool]:
    """GPT-4's preference with both orders averaged, whether they disagree, and whether it was asked at all."""
    if pair.verdicts is None:
        return float("nan"), False, False
    known = [{"win": 1.0, "loss": -1.0, "tie": 0.0}[word] for word in pair.verdicts if word is not None]
    return (float(np.mean(known)) if known else float("nan")), len(known) == 2 and known[0] * known[1] < 0, True
