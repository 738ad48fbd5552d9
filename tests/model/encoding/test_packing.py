"""A prefix tree holds every text once, counts the tokens of the closed form, and is cut where it costs least."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore.model.encoding.packing import Pack, PrefixTree


def tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(1000) for _ in range(count))


def group(prompt: tuple[int, ...], responses: list[tuple[int, ...]], orders: str = "both") -> list[tuple[int, ...]]:
    """The texts of one group in concat mode."""
    return [
        prompt + a + b
        for (i, a), (j, b) in itertools.product(enumerate(responses), repeat=2)
        if (i != j if orders == "both" else i < j)
    ]


def drawn(k: int, seed: int, shortest: int = 5, longest: int = 60) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """A prompt and K responses of mixed lengths; no two responses begin alike."""
    rng = random.Random(seed)
    responses = [(2000 + n, *tokens(rng, rng.randrange(shortest, longest))) for n in range(k)]
    return tokens(rng, rng.randrange(shortest, longest)), responses


def texts_of(pack: Pack) -> dict[int, tuple[int, ...]]:
    """Each text a pack completes, read off its spans."""
    found = {}
    for text, leaf in zip(pack.texts, pack.leaves, strict=True):
        ids: list[int] = []
        while leaf >= 0:
            span = pack.spans[leaf]
            assert pack.positions[span.start] == span.position
            ids = [*pack.ids[span.start : span.stop].tolist(), *ids]
            leaf = span.parent
        found[text] = tuple(ids)
    return found


def visible(pack: Pack) -> np.ndarray:
    """(T, T): what each token may see, from the spans alone."""
    mask = np.zeros((len(pack), len(pack)), dtype=bool)
    for k, span in enumerate(pack.spans):
        for q in range(span.start, span.stop):
            mask[q, span.start : q + 1] = True
            above = pack.spans[k].parent
            while above >= 0:
                mask[q, pack.spans[above].start : pack.spans[above].stop] = True
                above = pack.spans[above].parent
    return mask


# -- the count -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8, 16, 64])
def test_both_orders_count_as_the_closed_form(k):
    x, ys = drawn(k, seed=k, longest=20 if k == 64 else 60)
    tree = PrefixTree(group(x, ys))
    own = [len(y) for y in ys]
    expected = len(x) + sum(own) + (k - 1) * sum(own) if k > 1 else 0
    assert expected == (len(x) + sum(own) + sum(own[j] for i in range(k) for j in range(k) if i != j) if k > 1 else 0)
    assert tree.tokens == expected
    assert tree.flat_tokens == sum(len(x) + own[i] + own[j] for i in range(k) for j in range(k) if i != j)
    assert sum(map(len, tree.packs(10**9))) == expected


@pytest.mark.parametrize("k", [2, 5])
def test_one_order_counts_as_its_closed_form(k):
    x, ys = drawn(k, seed=k)
    tree = PrefixTree(group(x, ys, "one"))
    own = [len(y) for y in ys]
    # The last response is never first.
    assert tree.tokens == len(x) + sum(own[:-1]) + sum(own[j] for i in range(k) for j in range(i + 1, k))


@pytest.mark.parametrize("k", [2, 8, 64])
def test_difference_mode_counts_the_prompt_once(k):
    x, ys = drawn(k, seed=k)
    assert PrefixTree([x + y for y in ys]).tokens == len(x) + sum(map(len, ys))


def test_a_system_prompt_is_shared_by_groups():
    system = tokens(random.Random(0), 100)
    groups = [drawn(3, seed) for seed in (1, 2)]
    tree = PrefixTree([t for k, (x, ys) in enumerate(groups) for t in group((*system, 3000 + k, *x), ys)])
    alone = sum(PrefixTree(group((3000 + k, *x), ys)).tokens for k, (x, ys) in enumerate(groups))
    assert tree.tokens == 100 + alone
    assert len(list(tree.roots())) == 1


@pytest.mark.parametrize("k", [2, 4])
def test_the_tokens_of_a_template_are_shared_too(make_backbone, k):
    """x + A-header, each y_i, one B-header under each y_i, each y_j with its closing tokens."""
    backbone = make_backbone(
        "qwen2", pooling="last", pair_template="{prompt} Response A {first} Response B {second} ###"
    )
    responses = ["good fox", "bad dog " * 9, "Paris is", "a polite answer " * 5][:k]
    encode = backbone.encoder.encode
    texts = [encode("what is it?", a, b) for a, b in itertools.permutations(responses, 2)]
    header = backbone.encoder._literal
    before, between = len(header(" Response A ")), len(header(" Response B "))
    closing = len(header(" ###")) + 1  # and eos
    own = [len(backbone.encoder._content(r)) for r in responses]
    prompt = len(backbone.encoder._content("what is it?"))
    expected = prompt + before + sum(own) + k * between + (k - 1) * sum(own) + k * (k - 1) * closing
    assert PrefixTree([t.ids for t in texts], min_shared=1).tokens == expected
    # As segments, each y_j keeps its own header: that is the most the tree can be.
    assert expected <= prompt + before + sum(own) + (k - 1) * sum(n + between + closing for n in own)


def test_a_beginning_shorter_than_a_node_is_not_shared():
    texts = [(1, 2, 3, 4), (1, 2, 3, 5), (1, 9)]
    assert PrefixTree(texts, min_shared=4).tokens == 10
    assert PrefixTree(texts, min_shared=3).tokens == 7
    assert PrefixTree(texts, min_shared=1).tokens == 6


# -- the tree --------------------------------------------------------------------------------------------------------

short = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)


@given(texts=st.lists(short, max_size=30, unique=True), shared=st.integers(1, 4), budget=st.integers(1, 60))
def test_every_text_comes_back_from_exactly_one_pack(texts, shared, budget):
    tree = PrefixTree(texts, min_shared=shared)
    packs = tree.packs(budget)
    found: dict[int, tuple[int, ...]] = {}
    for pack in packs:
        read = texts_of(pack)
        assert not read.keys() & found.keys()
        found |= read
        assert len(pack) <= budget or len(pack.texts) == 1
        assert pack.longest == max(map(len, read.values()))
    assert found == dict(enumerate(texts))
    assert tree.tokens <= sum(map(len, packs)) <= tree.flat_tokens


@given(texts=st.lists(short, min_size=1, max_size=12, unique=True))
def test_subtree_ends_say_what_a_token_may_see(texts):
    (pack,) = PrefixTree(texts, min_shared=1).packs(1000)
    q, kv = np.ogrid[: len(pack), : len(pack)]
    assert np.array_equal(visible(pack), (kv <= q) & (q < pack.subtree_ends[None, :]))
    for leaf, text in zip(pack.leaves, pack.texts, strict=True):
        for position, token in enumerate(texts[text]):
            assert pack.ids[pack.index(leaf, position)] == token
            assert pack.positions[pack.index(leaf, position)] == position
        with pytest.raises(InputError, match="position"):
            pack.index(leaf, len(texts[text]))


def test_the_order_of_the_texts_changes_nothing_but_their_numbers():
    x, ys = drawn(5, seed=3)
    texts = group(x, ys)
    shuffled = random.Random(0).sample(range(len(texts)), len(texts))
    one, two = PrefixTree(texts).packs(300), PrefixTree([texts[k] for k in shuffled]).packs(300)
    assert [p.ids.tolist() for p in one] == [p.ids.tolist() for p in two]
    assert [p.texts for p in one] == [tuple(shuffled[k] for k in p.texts) for p in two]
    assert [p.texts for p in one] == [p.renumbered(shuffled).texts for p in two]


def test_texts_nested_a_thousand_deep():
    texts = [tuple(range(4 * n)) for n in range(1, 1001)]
    tree = PrefixTree(texts)
    assert tree.tokens == 4000
    (pack,) = tree.packs(4000)
    assert texts_of(pack) == dict(enumerate(texts))


def test_nothing_at_all():
    tree = PrefixTree([])
    assert (tree.tokens, tree.packs(8), list(tree.roots())) == (0, [], [])


def test_bad_texts():
    with pytest.raises(InputError, match=r"texts\[1\].*no tokens"):
        PrefixTree([(1,), ()])
    with pytest.raises(InputError, match="two equal"):
        PrefixTree([(1, 2), (3,), (1, 2)])
    with pytest.raises(InputError, match="min_shared"):
        PrefixTree([(1,)], min_shared=0)
    with pytest.raises(InputError, match="max_tokens"):
        PrefixTree([(1,)]).packs(0)


# -- the cuts --------------------------------------------------------------------------------------------------------


def cheapest(lengths: list[int], shared: list[int], budget: int) -> float:
    """The least cost of cutting consecutive texts, over every way to cut."""
    best = float("inf")
    count = len(lengths)
    for cut in itertools.product((False, True), repeat=count - 1):
        starts = [0, *(k + 1 for k, c in enumerate(cut) if c)]
        sizes = [
            lengths[a] + sum(lengths[k] - shared[k] for k in range(a + 1, b))
            for a, b in zip(starts, [*starts[1:], count], strict=True)
        ]
        if all(size <= budget or b - a == 1 for size, a, b in zip(sizes, starts, [*starts[1:], count], strict=True)):
            best = min(best, sum(sizes) + len(starts) * budget / 64)
    return best


@given(texts=st.lists(short, min_size=1, max_size=9, unique=True), budget=st.integers(4, 40))
def test_no_other_cut_is_cheaper(texts, budget):
    tree = PrefixTree(texts, min_shared=1)
    packs = tree.packs(budget)
    order = sorted(texts)
    common = [0]
    for a, b in itertools.pairwise(order):
        common.append(next((n for n, (p, q) in enumerate(zip(a, b, strict=False)) if p != q), min(len(a), len(b))))
    cost = sum(map(len, packs)) + len(packs) * budget / 64
    assert cost == pytest.approx(cheapest([len(t) for t in order], common, budget))


def test_a_large_group_is_cut_between_first_responses():
    """x of 50 tokens, eight responses of 50: y_i and what is under it is 400 tokens, so 850 holds two of them and x."""
    rng = random.Random(0)
    x, ys = tokens(rng, 50), [(2000 + n, *tokens(rng, 49)) for n in range(8)]
    tree = PrefixTree(group(x, ys))
    assert tree.tokens == 50 + 8 * 400
    assert [len(p) for p in tree.packs(850)] == [850] * 4
    assert [len(p) for p in tree.packs(450)] == [450] * 8
    # Where two do not fit, x alone is computed again, or x and one y_i in fewer packs: no more than one y_i a pack.
    assert sum(map(len, tree.packs(800))) == 8 * 450


def test_groups_are_packed_together_up_to_the_budget():
    groups = [drawn(2, seed, 9, 10) for seed in range(10)]
    tree = PrefixTree([t for k, (x, ys) in enumerate(groups) for t in group((3000 + k, *x), ys)])
    each = {tokens for _, tokens in tree.roots()}
    assert each == {10 + 4 * 10}
    assert [len(p) for p in tree.packs(260)] == [250, 250]


def test_only_some_roots():
    x, ys = drawn(3, seed=1)
    texts = [*group(x, ys), (7, 7, 7)]
    tree = PrefixTree(texts)
    roots = [members for members, _ in tree.roots()]
    assert sorted(map(len, roots)) == [1, 6]
    largest = max(roots, key=len)
    (pack,) = tree.packs(10**6, largest)
    assert texts_of(pack) == {k: texts[k] for k in range(6)}
