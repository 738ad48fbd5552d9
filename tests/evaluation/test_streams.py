"""The example corpus is what its README says; the data folder, where there is one, gives the streams it documents."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path

import pytest

from rmcore._base.errors import DataError
from rmcore.evaluation.streams import find_data, load_corpus


def test_the_examples_hold_what_their_readme_says() -> None:
    corpus = load_corpus(None)
    assert len(corpus.train) == 80 * 6
    assert len(corpus.parts["test"]) == 32 * 6
    assert len(corpus.parts["adversarial"]) == 28 * 6
    domains = Counter(pair.source for pair in corpus.parts["adversarial"])
    assert len(domains) == 2
    trained = {preference.prompt for preference in corpus.train}
    for part in corpus.parts.values():
        assert not trained & {pair.prompt for pair in part}
    for group in corpus.groups:
        assert sorted(group.ranking) == [0, 1, 2, 3]
        assert sorted((i, j) for i, j, _ in group.verdicts) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_mixed_streams_are_half_and_half_and_seeded() -> None:
    corpus = load_corpus(None)
    stream, again, other = corpus.streams(0)[1], corpus.streams(0)[1], corpus.streams(1)[1]
    counts = Counter(pair.source.startswith("polished") for pair in stream.pairs)
    assert counts[True] == counts[False] == 168
    assert stream.pairs == again.pairs
    assert stream.pairs != other.pairs


def test_a_share_is_drawn_of_every_part_and_seeded() -> None:
    whole = load_corpus(None)
    some = whole.share(0.5, 3)
    for all_of, drawn in [(whole.train, some.train), *((whole.parts[name], some.parts[name]) for name in whole.parts)]:
        assert len(drawn) == math.ceil(len(all_of) / 2)
        assert [pair for pair in all_of if pair in drawn] == list(drawn), "in their order"
    assert some.train == whole.share(0.5, 3).train != whole.share(0.5, 4).train
    assert whole.share(1.0, 0).train == whole.train


def test_a_swapped_pair_says_the_same() -> None:
    pair = load_corpus(None).parts["test"][0]
    turned = pair.swapped()
    assert (turned.first, turned.second, turned.label) == (pair.second, pair.first, 1 - pair.label)
    assert turned.swapped() == pair


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        find_data(tmp_path / "no such folder")


@pytest.mark.data
@pytest.mark.skipif("RMCORE_DATA" not in os.environ, reason="RMCORE_DATA is not set: no preference data")
def test_the_data_folder_gives_the_documented_streams() -> None:
    corpus = load_corpus(find_data())
    assert len(corpus.train) == 761
    assert {name: len(part) for name, part in corpus.parts.items()} == {"id": 257, "llmbar": 419, "xstest": 280}
    verdicts = [pair.verdicts for pair in corpus.parts["llmbar"]]
    assert sum(v is not None and v[0] != v[1] for v in verdicts) == 30, "GPT-4's order flips on LLMBar"
    labels = Counter(pair.label for pair in corpus.parts["llmbar"])
    assert min(labels.values()) > 150, "the better response comes first about half of the time"
