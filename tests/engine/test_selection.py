"""Best-of-n by lower confidence bound and filters by uncertainty, on matrices small enough to do by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import InputError, NonFiniteError
from rmcore.engine import RewardEngine
from rmcore.engine.groups import GroupScore, PairDecision
from rmcore.engine.selection import best_of, filter_groups, member_uncertainties, member_uncertainty


def group(preference: list[list[float]], uncertainty: list[list[float]] | None = None, decisions=()) -> GroupScore:
    p = torch.tensor(preference, dtype=torch.float64)
    u = torch.ones_like(p) if uncertainty is None else torch.tensor(uncertainty, dtype=torch.float64)
    return GroupScore(p, u, p.clone(), torch.zeros_like(p), torch.zeros_like(p, dtype=torch.bool), tuple(decisions))


#        0 beats 1 by 2 but unsurely; 1 and 2 are close and sure
RISKY = group(
    [[0, 2.0, 1.0], [-2.0, 0, 0.5], [-1.0, -0.5, 0]],
    [[1, 3.0, 2.0], [3.0, 1, 1.0], [2.0, 1.0, 1]],
)


def test_member_uncertainty_is_the_mean_over_its_pairs():
    assert member_uncertainty(RISKY).tolist() == [2.5, 2.0, 1.5]


def test_a_decided_pair_counts_as_sure():
    decided = group(
        RISKY.preference.tolist(),
        RISKY.uncertainty.tolist(),
        [PairDecision(0, 1, "judge"), PairDecision(0, 2, "identical")],
    )
    assert member_uncertainty(decided).tolist() == [1.0, 1.0, 1.0]
    failed = group(
        RISKY.preference.tolist(), RISKY.uncertainty.tolist(), [PairDecision(0, 1, "judge_failed", "timeout")]
    )
    assert member_uncertainty(failed).tolist() == [2.5, 2.0, 1.5]


def test_the_mean_and_the_bound_choose_differently():
    (mean,) = best_of([RISKY], [["a", "b", "c"]])
    assert (mean.index, mean.response, mean.score) == (0, "a", 1.5)
    assert mean.scores.tolist() == [1.5, -0.75, -0.75]
    (bound,) = best_of([RISKY], [["a", "b", "c"]], penalty=4.0)  # 1.5−10, −0.75−8, −0.75−6
    assert (bound.index, bound.score) == (2, -6.75)


@pytest.mark.parametrize(("rule", "index"), [("first", 0), ("shortest", 1), ("longest", 2)])
def test_ties_go_by_rule(rule, index):
    (best,) = best_of([group([[0.0] * 3] * 3)], [["two", "1", "three"]], ties=rule)
    assert (best.index, best.tied) == (index, 3)


def test_one_response_wins_by_itself():
    (best,) = best_of([group([[0.0]])], [["only"]], penalty=2.0)
    assert (best.index, best.score) == (0, -2.0)


def test_a_response_without_a_preference_never_wins():
    nan, inf = math.nan, math.inf
    hurt = group([[0, nan, nan], [nan, 0, -1.0], [nan, 1.0, 0]], [[1, inf, inf], [inf, 1, 1], [inf, 1, 1]])
    (best,) = best_of([hurt], [["a", "b", "c"]])
    assert best.index == 2
    assert math.isnan(best.scores[0])
    lost = group([[0, nan], [nan, 0]])
    with pytest.raises(NonFiniteError, match=r"groups\[1\]") as error:
        best_of([RISKY, lost])
    assert error.value.rows == (1,)


@given(st.integers(2, 6), st.integers(0, 2**31), st.floats(0, 5))
def test_the_winner_has_the_highest_bound(k, seed, penalty):
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(k, k, generator=generator, dtype=torch.float64)
    u = 1 + torch.rand(k, k, generator=generator, dtype=torch.float64)
    scored = group((p - p.mT).tolist(), ((u + u.mT) / 2).tolist())
    (best,) = best_of([scored], penalty=penalty)
    assert best.score == float(best.scores.max())
    assert int(best.scores.argmax()) == best.index


def test_filters_count_what_they_drop():
    calm = group([[0, 1.0], [-1.0, 0]])
    by_response = filter_groups([RISKY, calm], 2.0)
    assert by_response.responses == ((1, 2), (0, 1))
    assert (by_response.groups, by_response.dropped_responses, by_response.dropped_groups) == ((0, 1), 1, 0)
    strict = filter_groups([RISKY, calm], 1.6)  # one response left of RISKY: no pair, so the group goes
    assert (strict.responses, strict.groups) == (((), (0, 1)), (1,))
    assert (strict.dropped_responses, strict.dropped_groups) == (3, 1)
    assert filter_groups([RISKY, calm], 1.6, min_responses=1).responses == ((2,), (0, 1))
    whole = filter_groups([RISKY, calm], 1.9, by="group")
    assert whole.responses == ((), (0, 1))
    assert filter_groups([RISKY, calm], 2.0, by="group").groups == (0, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_of([RISKY], penalty=-1.0), "penalty: got -1.0"),
        (lambda: best_of([RISKY], penalty=math.nan), "penalty: got nan"),
        (lambda: best_of([RISKY], ties="random"), "ties: got 'random'"),
        (lambda: best_of([RISKY], ties="shortest"), "responses: got None"),
        (lambda: best_of([RISKY], [["a"]]), r"responses: got groups of \[1\]"),
        (lambda: filter_groups([RISKY], 0.5), "max_uncertainty: got 0.5"),
        (lambda: filter_groups([RISKY], math.nan), "max_uncertainty: got nan"),
        (lambda: filter_groups([RISKY], 2.0, by="pair"), "by: got 'pair'"),
        (lambda: filter_groups([RISKY], 2.0, min_responses=0), "min_responses: got 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_the_engine_scores_and_chooses_in_one_call(table_model, hand_head):
    # u grows with the distance from the origin, and "9 0" is as far out as it is good
    model = table_model(hand_head([1.0, 0.0]), lambda _prompt, text: [float(x) for x in text.split()[:2]])
    engine = RewardEngine(model)
    responses = [["1 0", "9 0", "0 0", "2 0"], ["0 0"]]
    for penalty in (0.0, 1.0):
        chosen = engine.best_of(["a", "b"], responses, penalty=penalty)
        expected = best_of(engine.score(["a", "b"], responses), responses, penalty=penalty)
        assert [(c.index, c.response, c.score) for c in chosen] == [(e.index, e.response, e.score) for e in expected]
    assert engine.best_of(["a"], responses[:1])[0].response == "9 0"
    assert engine.best_of(["a"], responses[:1], penalty=9.0)[0].response != "9 0"


def test_a_bad_choice_is_refused_before_anything_is_scored(hand_head, table_model):
    model = table_model(hand_head([1.0]), lambda *_: pytest.fail("scored"))
    with pytest.raises(InputError, match="ties"):
        RewardEngine(model).best_of(["a"], [["1", "2"]], ties="random")  # type: ignore[arg-type]


# -- all groups at once ----------------------------------------------------------------------------------------------


def u_by_hand(scored: GroupScore) -> list[float]:
    by = {(d.i, d.j): d.by for d in scored.decisions}
    result = []
    for i in range(scored.size):
        found = []
        for j in range(scored.size):
            who = by.get((min(i, j), max(i, j)))
            if i != j and who != "nobody":
                found.append(1.0 if who in ("judge", "identical") else float(scored.uncertainty[i, j]))
        result.append(sum(found) / len(found) if found else 1.0 if scored.size == 1 else math.inf)
    return result


@st.composite
def scored_groups(draw) -> list[GroupScore]:
    """Groups of mixed sizes with small whole numbers, so that there are ties, and pairs that somebody decided."""
    groups = []
    for k in draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)):
        p, u, decisions = torch.zeros(k, k).double(), torch.ones(k, k).double(), []
        for i in range(k):
            for j in range(i + 1, k):
                p[i, j] = draw(st.integers(-1, 1))
                u[i, j] = u[j, i] = draw(st.sampled_from([1.0, 1.5, 3.0, math.inf]))
                by = draw(st.sampled_from(["head", "head", "judge", "identical", "nobody"]))
                if by == "nobody":
                    p[i, j], u[i, j], u[j, i] = math.nan, math.inf, math.inf
                if by != "head":
                    decisions.append(PairDecision(i, j, by))
        groups.append(GroupScore(p - p.mT, u, p - p.mT, torch.zeros_like(p), p.isnan(), tuple(decisions)))
    return groups


@given(scored_groups(), st.sampled_from([0.0, 0.5]), st.sampled_from(["first", "shortest", "longest"]), st.data())
def test_a_batch_chooses_as_its_groups_do_alone(groups, penalty, ties, data):
    texts = [data.draw(st.lists(st.sampled_from(["a", "bb", "cc"]), min_size=g.size, max_size=g.size)) for g in groups]
    expected = []
    for number, (scored, own) in enumerate(zip(groups, texts, strict=True)):
        bound = [
            a - (penalty * u if penalty else 0.0)
            for a, u in zip(scored.advantages.tolist(), u_by_hand(scored), strict=True)
        ]
        usable = [i for i, value in enumerate(bound) if not math.isnan(value) and value != -math.inf]
        if not usable:
            with pytest.raises(NonFiniteError) as error:
                best_of(groups, texts, penalty=penalty, ties=ties)
            assert error.value.rows == (number,)
            return
        best = [i for i in usable if bound[i] == max(bound[k] for k in usable)]
        sign = {"first": 0, "shortest": 1, "longest": -1}[ties]
        expected.append((min(best, key=lambda i, own=own: (sign * len(own[i]), i)), len(best)))
    found = best_of(groups, texts, penalty=penalty, ties=ties)
    assert [(one.index, one.tied) for one in found] == expected
    assert [one.response for one in found] == [own[i] for own, (i, _) in zip(texts, expected, strict=True)]
    assert [one.score for one in found] == [float(one.scores[one.index]) for one in found]
    assert [len(one.scores) for one in found] == [g.size for g in groups]


@given(scored_groups(), st.sampled_from([1.0, 1.25, 2.0]), st.integers(1, 3))
def test_a_batch_keeps_what_its_groups_keep_alone(groups, most, least):
    u = [u_by_hand(g) for g in groups]
    assert member_uncertainties(groups).tolist() == [value for own in u for value in own]
    kept = [tuple(i for i, value in enumerate(own) if value <= most) for own in u]
    kept = [own if len(own) >= least else () for own in kept]
    found = filter_groups(groups, most, min_responses=least)
    assert found.responses == tuple(kept)
    assert found.groups == tuple(k for k, own in enumerate(kept) if own)
    assert found.dropped_responses == sum(len(own) for own in u) - sum(map(len, kept))
    assert found.dropped_groups == len(groups) - len(found.groups)
    alone = [filter_groups([g], most, by="group", min_responses=least) for g in groups]
    whole = filter_groups(groups, most, by="group", min_responses=least)
    assert whole.responses == tuple(one.responses[0] for one in alone)


def test_no_groups_are_no_choice():
    assert best_of([]) == []
    assert filter_groups([], 2.0).responses == ()
