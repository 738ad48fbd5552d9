"""Learning from verdicts, end to end: which pairs are taken, versions and their journal, and the engine that serves."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest
import torch
from support.learner import batch, bits, group, learnt

from rmcore import RewardEngine
from rmcore._base.errors import InputError
from rmcore.engine.groups import GroupScores, PairDecision
from rmcore.engine.learning import LearningConfig, VerdictLearner
from rmcore.engine.learning.judged import JudgedPairs, judged_pairs
from rmcore.engine.routing import AlwaysRoute
from rmcore.head.checkpoint import load_head, save_head
from rmcore.judge import RecordedJudge
from rmcore.judge.base import RULE, Verdict

WIN, LOSS, TIE = (Verdict.of(word) for word in ("win", "loss", "tie"))


def by_judge(i, j, verdict):
    return PairDecision(i, j, "judge" if verdict.preference is not None else "judge_failed", verdict.reason, verdict)


def rows(count, size=3):
    return torch.arange(count * size, dtype=torch.float32).view(count, size)


# -- which pairs, as what --------------------------------------------------------------------------------------------


def test_difference_mode_takes_two_rows_a_pair_each_row_once():
    scores = GroupScores(
        (group(1, []), group(3, [by_judge(0, 2, WIN), by_judge(1, 2, LOSS)]), group(2, [by_judge(0, 1, TIE)])),
        hidden=rows(6),
    )
    judged = judged_pairs(scores, "difference")
    assert torch.equal(judged.hidden, rows(6)[[1, 3, 2, 4, 5]])
    assert torch.equal(judged.hidden[judged.pairs], rows(6)[torch.tensor([[1, 3], [2, 3], [4, 5]])])
    assert judged.labels.tolist() == [1.0, 0.0, 0.5]
    assert judged.weights.tolist() == [1.0, 1.0, 1.0]
    assert judged.skipped == {}


def test_concat_mode_takes_both_orders_of_a_pair():
    """Rows are the ordered pairs, row-major: of three responses 01 02 10 12 20 21."""
    scores = GroupScores((group(2, []), group(3, [by_judge(0, 1, WIN), by_judge(1, 2, LOSS)])), hidden=rows(8))
    judged = judged_pairs(scores, "concat")
    assert torch.equal(judged.hidden, rows(8)[[2 + 0, 2 + 2, 2 + 3, 2 + 5]])
    assert judged.labels.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert judged.pairs is None


@pytest.mark.parametrize("k", [2, 3, 5])
def test_concat_mode_with_one_order_takes_that_one(k):
    everything = [(i, j) for i in range(k) for j in range(i + 1, k)]
    for place, (i, j) in enumerate(everything):
        scores = GroupScores((group(k, [by_judge(i, j, LOSS)], one_order=True),), hidden=rows(len(everything)))
        judged = judged_pairs(scores, "concat")
        assert torch.equal(judged.hidden, rows(len(everything))[[place]])
        assert judged.labels.tolist() == [0.0]


@pytest.mark.parametrize("k", [2, 3, 5])
def test_concat_rows_are_where_the_engine_puts_them(k):
    ordered = [(i, j) for i in range(k) for j in range(k) if i != j]
    for i, j in [(i, j) for i, j in ordered if i < j]:
        hidden = torch.tensor(ordered, dtype=torch.float32)
        judged = judged_pairs(GroupScores((group(k, [by_judge(i, j, WIN)]),), hidden=hidden), "concat")
        assert judged.hidden.tolist() == [[i, j], [j, i]]


@pytest.mark.parametrize(
    ("verdict", "settings", "label", "weight"),
    [
        (WIN, {"epsilon": 0.12}, 0.88, 1.0),
        (LOSS, {"epsilon": 0.12}, 0.12, 1.0),
        (TIE, {"epsilon": 0.12}, 0.5, 1.0),
        (Verdict(0.5), {}, 0.75, 1.0),
        (Verdict(-0.25), {"epsilon": 0.1}, 0.4, 1.0),
        (WIN, {"judge_weight": 3.0}, 1.0, 3.0),
        (Verdict(0.0, flipped=True), {"flip_weight": 0.5, "judge_weight": 2.0}, 0.5, 1.0),
        (Verdict(1.0, reason="one_order:timeout"), {}, 1.0, 1.0),
    ],
)
def test_a_verdict_becomes_a_label_and_a_weight(verdict, settings, label, weight):
    scores = GroupScores((group(2, [by_judge(0, 1, verdict)]),), hidden=rows(2))
    judged = judged_pairs(scores, "difference", **settings)
    assert judged.labels.tolist() == [pytest.approx(label)]
    assert judged.weights.tolist() == [pytest.approx(weight)]


def test_what_is_not_learned_from_is_counted():
    hidden = rows(6)
    hidden[3] = torch.nan
    hidden[5] = hidden[4]
    decisions = [
        by_judge(0, 1, Verdict.none("timeout")),
        by_judge(0, 2, replace(WIN, judge=RULE)),
        by_judge(1, 2, Verdict(0.0, flipped=True)),
        by_judge(1, 3, WIN),
        by_judge(1, 4, WIN),
        by_judge(1, 5, WIN),  # the same question as the one before
        PairDecision(4, 5, "identical"),
        PairDecision(0, 5, "judge_failed", "budget"),
    ]
    judged = judged_pairs(GroupScores((group(6, decisions),), hidden=hidden), "difference")
    assert judged.skipped == {"failed": 2, "rule": 1, "flip": 1, "nonfinite": 1, "repeated": 1}
    assert torch.equal(judged.hidden, hidden[[1, 4]])


def test_rows_that_are_not_there_are_asked_for():
    with pytest.raises(InputError, match=r"scores\.hidden: got None.*learner"):
        judged_pairs(GroupScores((group(2, []),)), "difference")
    with pytest.raises(InputError, match=r"scores\.hidden: got shape \(3, 3\), expected \(2, h\)"):
        judged_pairs(GroupScores((group(2, []),), hidden=rows(3)), "difference")


@pytest.mark.parametrize("mode", ["difference", "concat"])
@pytest.mark.parametrize("likelihood", ["logistic", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_revert_gives_every_version_back_bit_for_bit(data, fit_head, tmp_path, mode, likelihood, dtype):
    head = fit_head(data, mode=mode, likelihood=likelihood, dtype=dtype)
    with VerdictLearner(head, tmp_path, snapshot_every=3) as learner:
        states = [bits(head)]
        for k in range(7):
            judged = batch(data, k)
            if mode == "concat":
                judged = JudgedPairs(data.hidden[10 * k : 10 * k + 10], judged.labels, judged.weights)
            report = learner.learn(judged)
            assert report.version == k + 1
            states.append(bits(learner.head))
        assert len({str(state) for state in states}) == 8
        for version in (5, 0, 7, 3, 1, 6, 2, 4):
            assert bits(learner.revert(version)) == states[version]
            assert learner.version == version
            assert learner.head.posterior.count == head.posterior.count + 10 * version
        assert [v.number for v in learner.versions if v.snapshot] == [0, 3, 6]


def test_an_update_after_a_revert_is_a_new_version_beside_the_old_ones(data, head, tmp_path):
    with VerdictLearner(head, tmp_path, snapshot_every=4) as learner:
        states = learnt(learner, data, 3)
        learner.revert(1)
        assert learner.learn(batch(data, 9)).version == 4
        branch = bits(learner.head)
        assert [v.parent for v in learner.versions] == [None, 0, 1, 2, 1]
        assert bits(learner.revert(3)) == states[3]
        assert bits(learner.revert(4)) == branch
    with VerdictLearner(head, tmp_path) as again:
        assert (again.version, bits(again.head)) == (4, branch)
        again.revert(0)
        assert bits(again.learn(batch(data, 0)) and again.head) == states[1]


def test_a_journal_goes_on_where_it_was_whichever_version_it_is_opened_with(data, head, tmp_path):
    with VerdictLearner(head, tmp_path / "journal") as learner:
        states = learnt(learner, data, 2)
        save_head(learner.head, tmp_path / "deployed")
        learner.learn(batch(data, 2))
        last = bits(learner.head)
    deployed = load_head(tmp_path / "deployed")
    assert bits(deployed) == states[2]
    for opened_with in (head, deployed):
        with VerdictLearner(opened_with, tmp_path / "journal") as again:
            assert again.version == 3
            assert bits(again.head) == last
            assert bits(again.revert(0)) == states[0]
            again.revert(3)


def test_an_updated_head_is_saved_and_loaded_bit_for_bit(data, head, tmp_path):
    with VerdictLearner(head, tmp_path / "journal") as learner:
        learner.learn(batch(data, 0))
        save_head(learner.head, tmp_path / "head")
        loaded = load_head(tmp_path / "head")
        assert bits(loaded) == bits(learner.head)
        sizes = torch.tensor([4, 4])
        for ours, theirs in zip(
            learner.head.score_pairs(data.hidden[:8], sizes), loaded.score_pairs(data.hidden[:8], sizes), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_one_update_weighs_at_most_its_share_of_the_first_fit(data, head, tmp_path):
    with VerdictLearner(head, tmp_path, LearningConfig(max_share=0.01)) as learner:
        for _ in range(3):  # of the first fit's 500, not of what was learnt since
            report = learner.learn(batch(data, 0))
            assert (report.weight, report.scaled) == (pytest.approx(5.0), pytest.approx(0.5))
    with VerdictLearner(head, tmp_path / "unbounded") as learner:
        assert learner.learn(batch(data, 0)).scaled == 1.0


def test_the_journal_says_what_was_done(data, head, tmp_path):
    with VerdictLearner(head, tmp_path) as learner:
        report = learner.learn(batch(data, 0))
        learner.revert(0)
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["open", "update", "revert"]
    assert lines[0]["head"]["config"] == head.config.to_dict()
    assert (lines[1]["version"], lines[1]["parent"], lines[1]["count"]) == (1, 0, 510)
    assert lines[1]["report"]["shift"] == report.shift
    assert not any(name.suffix in (".pkl", ".pt", ".tmp") for name in tmp_path.iterdir())
    # The rows of an update, not its D × D sum.
    assert (tmp_path / lines[1]["file"]).stat().st_size < data.hidden.numel() * 4 + 64 * 8 + 4096


# -- the engine ------------------------------------------------------------------------------------------------------

PROMPTS = ["p", "q"]
RESPONSES = [["a", "b", "c"], ["d", "e"]]


def recorded_judge(reverse=False):
    """Prefers the later letter, or the earlier one."""
    rows = []
    for prompt, answers in zip(PROMPTS, RESPONSES, strict=True):
        for i, first in enumerate(answers):
            rows += [
                {"prompt": prompt, "first": first, "second": second, "verdict": "win" if reverse else "loss"}
                for second in answers[i + 1 :]
            ]
    return RecordedJudge.from_rows(rows)


@pytest.fixture
def model(data, fit_head, table_model):
    """Texts of known hidden rows: a letter is a row of the data, an ordered pair of letters the sum of two."""

    def make(mode="difference"):
        def table(prompt, first, second=None):
            row = data.hidden[ord(first) - 97]
            return (row if second is None else row + data.hidden[100 + ord(second) - 97]).tolist()

        return table_model(fit_head(data, mode=mode, kernel_scale=2.0), table)

    return make


def preferences(scores):
    return torch.cat([group.logit.flatten() for group in scores])


@pytest.mark.parametrize("mode", ["difference", "concat"])
@pytest.mark.parametrize("orders", ["both", "one"])
def test_the_engine_learns_what_its_judge_says_and_can_unlearn_it(model, tmp_path, mode, orders):
    reward_model = model(mode)
    with VerdictLearner(reward_model.head, tmp_path, LearningConfig(max_share=1.0, max_shift=10.0)) as learner:
        engine = RewardEngine(reward_model, recorded_judge(), AlwaysRoute(), learner=learner, orders=orders)
        before = engine.score(PROMPTS, RESPONSES)
        report = engine.update(before)
        assert (report.version, report.skipped) == (1, {})
        assert report.pairs == 4 * (2 if (mode, orders) == ("concat", "both") else 1)
        assert engine.head is reward_model.head is learner.head
        after = engine.score(PROMPTS, RESPONSES)
        for old, new in zip(before, after, strict=True):
            i, j = torch.triu_indices(old.size, old.size, 1)
            assert bool((new.logit[i, j] < old.logit[i, j]).all())  # the second is better, says the judge
            assert bool((new.uncertainty[i, j] < old.uncertainty[i, j]).all())
        engine.revert(0)
        again = engine.score(PROMPTS, RESPONSES)
        assert torch.equal(preferences(again), preferences(before))
        engine.revert(1)
        assert torch.equal(preferences(engine.score(PROMPTS, RESPONSES)), preferences(after))


def test_rows_of_the_caller_are_learned_from_as_they_were_scored(data, head, tmp_path):
    hidden = data.hidden[:5].clone()
    with VerdictLearner(head, tmp_path) as learner:
        engine = RewardEngine(head, recorded_judge(), AlwaysRoute(), learner=learner)
        scores = engine.score_hidden(hidden, [3, 2], prompts=PROMPTS, responses=RESPONSES)
        hidden.zero_()  # a trainer uses its buffer again
        assert torch.equal(scores.hidden, data.hidden[:5])
        assert engine.update(scores).pairs == 4


def test_a_batch_without_verdicts_changes_nothing_and_says_why(head, data, tmp_path):
    nothing = RecordedJudge({})
    with VerdictLearner(head, tmp_path) as learner:
        engine = RewardEngine(head, nothing, AlwaysRoute(), learner=learner)
        scores = engine.score_hidden(data.hidden[:5], [3, 2], prompts=PROMPTS, responses=RESPONSES)
        report = engine.update(scores)
        assert (report.version, report.pairs, report.skipped) == (0, 0, {"failed": 4})
        assert engine.head is head


def test_learning_is_off_unless_asked_for(head, data, make_data, fit_head, tmp_path):
    engine = RewardEngine(head, recorded_judge(), AlwaysRoute())
    scores = engine.score_hidden(data.hidden[:5], [3, 2], prompts=PROMPTS, responses=RESPONSES)
    assert scores.hidden is None
    for verb in (lambda: engine.update(scores), lambda: engine.revert(0)):
        with pytest.raises(InputError, match="learner: got None"):
            verb()
    other = fit_head(make_data(seed=1, dtype=torch.float32), seed=5)
    with VerdictLearner(other, tmp_path) as learner, pytest.raises(InputError, match="other features"):
        RewardEngine(head, learner=learner)


def test_a_score_sees_one_head_from_beginning_to_end(data, head, tmp_path):
    """Updates race with scores; every score equals, bit for bit, that of exactly one version."""
    texts = {"prompts": PROMPTS * 20, "responses": RESPONSES * 20}
    sizes = [3, 2] * 20
    with VerdictLearner(head, tmp_path) as learner:
        engine = RewardEngine(head, recorded_judge(), AlwaysRoute(), learner=learner)
        seen, failures, stop = [], [], threading.Event()

        def keep_scoring():
            try:
                while not stop.is_set():
                    scores = engine.score_hidden(data.hidden[:100], sizes, **texts)
                    seen.append(torch.cat([torch.cat([g.logit, g.variance]).flatten() for g in scores]))
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=keep_scoring) for _ in range(2)]
        for thread in threads:
            thread.start()
        heads = [head]
        judged = engine.score_hidden(data.hidden[:100], sizes, **texts)
        for _ in range(12):
            engine.update(judged)
            heads.append(engine.head)
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    possible = set()
    for version in heads:
        scores = RewardEngine(version).score_hidden(data.hidden[:100], sizes)
        flat = torch.cat([torch.cat([g.logit, g.variance]).flatten() for g in scores])
        possible.add(flat.numpy().tobytes())
    assert len(possible) == 13
    assert {one.numpy().tobytes() for one in seen} <= possible
