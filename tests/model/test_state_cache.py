"""Encoded states are kept by encoder and text; a cache that fails costs time and nothing else."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmcore.model import Backbone
from rmcore.model.state_cache import StateCache

TEXTS = ["red tree", "good clear house", "bad", "odd vague river tree"]


@pytest.fixture
def load(backbone_path: Path, tmp_path: Path):
    def make(**options) -> Backbone:
        backbone = Backbone.from_pretrained(str(backbone_path), device="cpu", pooling="mean", **options)
        backbone.state_cache = StateCache(tmp_path / "states", backbone.identity, 32)
        return backbone

    return make


def encoded(backbone: Backbone, texts=TEXTS):
    return [backbone.encoder.encode("red", text) for text in texts]


def test_what_was_encoded_is_not_encoded_again(load) -> None:
    first = load()
    states = first.hidden(encoded(first))
    assert first.stats.cached == 0
    second = load()
    assert second.hidden(encoded(second)).equal(states)
    assert (second.stats.cached, second.stats.computed_tokens) == (4, 0)
    mixed = encoded(second, ["good", *TEXTS, "good"])
    rows = second.hidden(mixed)
    assert rows[1:5].equal(states)
    assert rows[0].equal(rows[5])
    assert second.stats.cached == 8


def test_an_interrupted_run_goes_on_where_it_was(load, monkeypatch) -> None:
    first = load(tokens_per_batch=8, packing="padded")
    passes = []

    def forward(ids, run=first._states.padded):
        if len(passes) == 2:
            raise KeyboardInterrupt
        passes.append(len(ids))
        return run(ids)

    monkeypatch.setattr(first._states, "padded", forward)
    with pytest.raises(KeyboardInterrupt):
        first.hidden(encoded(first))
    second = load(tokens_per_batch=8, packing="padded")
    second.hidden(encoded(second))
    assert second.stats.cached == sum(passes) == 2


def test_another_encoder_has_states_of_its_own(load) -> None:
    names = {load().identity}
    names |= {load(layer=1).identity, load(dtype=torch.bfloat16).identity, load(attn_implementation="eager").identity}
    assert len(names) == 4
    assert load(length_feature=0.5).identity in names, "the feature is added afterwards"


def test_weights_that_were_trained_are_not_looked_up(load) -> None:
    backbone = load()
    before = backbone.hidden(encoded(backbone))
    with torch.no_grad():
        backbone.model.embeddings.word_embeddings.weight.mul_(2)
    assert not backbone.hidden(encoded(backbone)).equal(before)
    assert backbone.stats.cached == 0


@given(st.lists(st.lists(st.integers(0, 2**40), max_size=5).map(tuple), unique=True, max_size=8), st.data())
def test_what_was_written_is_read(tmp_path_factory, texts, data) -> None:
    cache = StateCache(tmp_path_factory.mktemp("c"), "a", 3)
    states = torch.arange(3.0 * len(texts)).view(-1, 3)
    kept = sorted(data.draw(st.sets(st.sampled_from(range(len(texts))))) if texts else [])
    cache.write([texts[k] for k in kept], states[kept])
    where, found = cache.read(texts)
    assert sorted(where) == kept
    assert found.equal(states[where])
    cache.close()


def test_states_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    cache = StateCache(tmp_path, "a", 2)
    cache.write([(1,), (2,), (3,)], torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [0.0, -torch.inf]]))
    assert cache.read([(1,), (2,), (3,)])[0] == [0]


def test_more_texts_than_one_query_can_name(tmp_path: Path) -> None:
    cache = StateCache(tmp_path, "a", 1)
    texts = [(k,) for k in range(1501)]
    cache.write(texts, torch.arange(1501.0)[:, None])
    where, found = cache.read(texts)
    assert found[:, 0].tolist() == [float(k) for k in where]
    assert len(where) == 1501


def test_it_stops_at_its_size_and_says_so(tmp_path: Path, caplog) -> None:
    cache = StateCache(tmp_path, "a", 4, max_bytes=100_000)
    for k in range(20):
        cache.write([(k, n) for n in range(500)], torch.zeros(500, 4))
    assert 0 < cache.written < 10_000
    assert "not kept from here on" in caplog.text
    assert len(caplog.records) == 1
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 300_000


def test_encoders_unused_for_longest_make_room(tmp_path: Path) -> None:
    import os

    for k, name in enumerate("abc"):
        (tmp_path / f"{name}.sqlite").write_bytes(bytes(400))
        os.utime(tmp_path / f"{name}.sqlite", (1000 + k, 1000 + k))
    StateCache(tmp_path, "d", 2, max_bytes=1000).close()
    assert {file.name for file in tmp_path.glob("*.sqlite")} == {"c.sqlite", "d.sqlite"}


@pytest.mark.parametrize("content", [b"no database at all, but as long as one would be " * 40, b""])
def test_a_damaged_file_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.sqlite").write_bytes(content)
    cache = StateCache(tmp_path, "a", 1)
    cache.write([(1,)], torch.ones(1, 1))
    assert cache.read([(1,)])[0] == [0]


def test_a_file_damaged_meanwhile_or_a_folder_that_cannot_be_is_no_error(tmp_path: Path, caplog) -> None:
    cache = StateCache(tmp_path, "a", 1)
    other = sqlite3.connect(cache.path)
    other.execute("DROP TABLE states")
    other.close()
    assert cache.read([(1,)])[0] == []
    cache.write([(1,)], torch.ones(1, 1))
    (tmp_path / "file").touch()
    beside = StateCache(tmp_path / "file" / "states", "a", 1)
    beside.write([(1,)], torch.ones(1, 1))
    assert beside.read([(1,)])[0] == []
    assert len(caplog.records) == 2


def test_it_is_off_where_the_environment_says(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RMCORE_CACHE", "off")
    assert StateCache.default("a", 2) is None
    monkeypatch.setenv("RMCORE_CACHE", str(tmp_path))
    assert StateCache.default(None, 2) is None
    made = StateCache.default("a", 2)
    assert made is not None
    assert made.path == tmp_path / "states" / "a.sqlite"
