"""Learning from verdicts, end to end: which pairs are taken, versions and their journal, and the engine that serves."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

from rmcore import RewardEngine
from rmcore._base.errors import CheckpointError, InputError
from rmcore.engine.groups import GroupScore, GroupScores, PairDecision
from rmcore.engine.learning import LearningConfig, VerdictLearner, read_version
from rmcore.engine.learning.follow import JournalWatch, following, served_from
from rmcore.engine.learning.journal import Journal
from rmcore.engine.learning.judged import JudgedPairs, judged_pairs
from rmcore.engine.learning.learner import head_identity
from rmcore.engine.routing import AlwaysRoute
from rmcore.head.checkpoint import load_head, save_head
from rmcore.judge import RecordedJudge
from rmcore.judge.base import RULE, Verdict

WIN, LOSS, TIE = (Verdict.of(word) for word in ("win", "loss", "tie"))


def group(size, decisions, *, one_order=False):
    """A scored group of which only the decisions matter."""
    blank = torch.zeros(size, size, dtype=torch.float64)
    return GroupScore(blank, blank + 1, blank, blank, blank > 0, tuple(decisions), one_order)


def by_judge(i, j, verdict):
    return PairDecision(i, j, "judge" if verdict.preference is not None else "judge_failed", verdict.reason, verdict)


def rows(count, size=3):
    return torch.arange(count * size, dtype=torch.float32).view(count, size)


def bits(head):
    """Everything a head serves and learns with, as bytes."""
    tensors = [head.beta, head.posterior.gram.tril(), *head.weights.tensors().values()]
    if head.rows is not None:
        tensors += [head.rows.posterior.gram.tril(), *head.rows.weights.tensors().values()]
    counts = head.posterior.count, None if head.rows is None else head.rows.count
    return [t.view(torch.uint8).numpy().tobytes() for t in tensors], counts, head.weights.factor_scale


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


# -- versions --------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(make_data):
    return make_data(dtype=torch.float32)


@pytest.fixture
def head(data, fit_head):
    return fit_head(data, dtype=torch.bfloat16)


def batch(data, k):
    """The k-th ten pairs, with wrong labels so that every update moves the head."""
    part = slice(10 * k, 10 * k + 10)
    return JudgedPairs(data.hidden, 1 - data.labels[part], torch.ones(10), data.pairs[part])


def learnt(learner, data, updates):
    """The bits of every version after so many updates."""
    states = [bits(learner.head)]
    for k in range(updates):
        learner.learn(batch(data, k))
        states.append(bits(learner.head))
    return states


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


# -- crashes and damage ----------------------------------------------------------------------------------------------


def test_a_journal_cut_anywhere_in_its_last_line_is_the_version_before(data, head, tmp_path):
    with VerdictLearner(head, tmp_path / "whole", snapshot_every=2) as learner:
        states = learnt(learner, data, 2)
    lines = (tmp_path / "whole" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    kept, last = b"".join(lines[:-1]), lines[-1]
    for cut in (0, 1, len(last) // 2, len(last) - 2, len(last) - 1):
        folder = tmp_path / f"cut-{cut}"
        shutil.copytree(tmp_path / "whole", folder)
        (folder / "journal.jsonl").write_bytes(kept + last[:cut])
        (folder / ".update-000002.safetensors.tmp").write_bytes(b"half a file")
        with VerdictLearner(head, folder, snapshot_every=2) as learner:
            assert (learner.version, bits(learner.head)) == (1, states[1])
            assert learner.learn(batch(data, 1)).version == 2
            assert bits(learner.head) == states[2]
        with VerdictLearner(head, folder) as learner:
            assert (learner.version, bits(learner.head)) == (2, states[2])


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_disk_that_fails_at_any_step_leaves_the_version_before(data, head, tmp_path, monkeypatch, failing):
    """Writing a version syncs the tensor file, its folder, the line and the folder again."""
    with VerdictLearner(head, tmp_path) as learner:
        states = learnt(learner, data, 1)
        left, real = [failing], os.fsync

        def fsync(descriptor):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(28, "No space left on device")
            real(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with pytest.raises(OSError, match="No space"):
                learner.learn(batch(data, 1))
        assert left[0] == 0
        assert (learner.version, bits(learner.head)) == (1, states[1])
        assert learner.learn(batch(data, 1)).version == 2
        after = bits(learner.head)
    with VerdictLearner(head, tmp_path) as again:
        assert (again.version, bits(again.head)) == (2, after)


CHILD = """
import sys, torch
from rmcore.engine.learning import VerdictLearner
from rmcore.engine.learning.judged import JudgedPairs
from rmcore.head.checkpoint import load_head
torch.set_num_threads(1)
learner = VerdictLearner(load_head(sys.argv[1]), sys.argv[2], snapshot_every=3)
hidden = torch.load(sys.argv[3], weights_only=True)
k = 0
while True:
    k += 1
    labels = torch.full((10,), float(k % 2))
    learner.learn(JudgedPairs(hidden, labels, torch.ones(10), torch.arange(20).view(-1, 2) + k % 50))
    print(learner.version, flush=True)
"""


def test_killed_in_the_middle_every_version_is_there_or_was_never_told(data, head, tmp_path):
    save_head(head, tmp_path / "head")
    torch.save(data.hidden, tmp_path / "hidden.pt")
    arguments = [sys.executable, "-c", CHILD, *(str(tmp_path / n) for n in ("head", "journal", "hidden.pt"))]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
        told = [int(child.stdout.readline()) for _ in range(7)]
        child.send_signal(signal.SIGKILL)
        told += [int(line) for line in child.stdout.read().split()]
    with VerdictLearner(load_head(tmp_path / "head"), tmp_path / "journal", snapshot_every=3) as learner:
        assert learner.version in (told[-1], told[-1] + 1)
        for version in range(len(learner.versions)):
            learner.revert(version)  # checks every digest on the way
        assert learner.learn(batch(data, 0)).version == len(learner.versions) - 1


def test_damage_is_told_from_a_crash(data, head, make_data, fit_head, tmp_path):
    with VerdictLearner(head, tmp_path / "whole", snapshot_every=10) as learner:
        learnt(learner, data, 2)
    lines = (tmp_path / "whole" / "journal.jsonl").read_bytes().splitlines(keepends=True)

    def damaged(name, content):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "whole", folder)
        (folder / "journal.jsonl").write_bytes(b"".join(content))
        return folder

    first, second, third = lines
    for name, content, message in [
        ("a torn middle", [first, second[:40] + b"\n", third], r"journal\.jsonl:2"),
        ("a missing line", [first, third], r"journal\.jsonl:2.*version 1 was due"),
        ("outside", [first, second.replace(b"update-000001", b"../x"), third], "outside the folder"),
        ("newer", [first.replace(b'"format_version":1', b'"format_version":2')], "expected 'rmcore-journal' 1"),
        ("a list", [b"[]\n"], r"journal\.jsonl:1"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            VerdictLearner(head, damaged(name, content))
    foreign = tmp_path / "foreign"
    with VerdictLearner(head, foreign, snapshot_every=10) as learner:
        learner.learn(batch(data, 2))
        learner.learn(batch(data, 3))
    row = (foreign / "journal.jsonl").read_bytes().splitlines(keepends=True)[2]
    mixed = damaged("a row of another journal", [first, second, row])
    with pytest.raises(CheckpointError, match=r"update-000002\.safetensors: missing, or its sha256 differs"):
        VerdictLearner(head, mixed)
    shutil.copy(foreign / "update-000002.safetensors", mixed)
    with pytest.raises(CheckpointError, match=r"a row of another journal', whose version 2, .* has other bits"):
        VerdictLearner(head, mixed)
    wrong = damaged(
        "a count", [first.replace(b'"count":500', b'"count":5000'), second.replace(b'"count":510', b'"count":5010')]
    )
    (wrong / "update-000002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"whose version 0 has 5000 data, expected 500, this head's"):
        VerdictLearner(head, wrong)
    file = tmp_path / "whole" / "update-000001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="sha256"):
        VerdictLearner(head, tmp_path / "whole")
    other = fit_head(make_data(seed=1, dtype=torch.float32), dtype=torch.bfloat16, seed=1)
    with pytest.raises(CheckpointError, match="of another head"):
        VerdictLearner(other, tmp_path / "whole")
    elsewhere = replace_beta(head)
    with pytest.raises(CheckpointError, match="no version equal to this head"):
        VerdictLearner(elsewhere, tmp_path / "whole")


def replace_beta(head):
    from rmcore.head import FrozenHead

    return FrozenHead(head.config, head.feature_map, head.beta + 1, head.beta0, head.posterior)


def test_rows_of_verdicts_are_rows_seen(data, head, tmp_path):
    with VerdictLearner(head, tmp_path, snapshot_every=2) as learner:
        far = batch(data, 0)
        far = replace(far, hidden=far.hidden + 9)
        before = learner.head.novelty(far.hidden[far.pairs[0]])
        learner.learn(far)
        first = learner.head
        assert bool((first.novelty(far.hidden[far.pairs[0]]) < before / 2).all())
        assert first.rows.count == head.rows.count + len(far.pairs.unique())
        learner.learn(far)
        assert bits(learner.revert(1)) == bits(first)  # replayed
        assert torch.equal(learner.revert(0).novelty(data.hidden), head.novelty(data.hidden))


def test_a_head_without_row_posterior_has_the_identity_it_always_had(data, fit_head, tmp_path):
    old = fit_head(data, dtype=torch.float16, row_ridge=None)
    with VerdictLearner(old, tmp_path, snapshot_every=2) as learner:
        states = learnt(learner, data, 3)
        assert learner.head.rows is None
        assert bits(learner.revert(2)) == states[2]
        assert "row_ridge" not in head_identity(learner.head)["config"]


def test_a_replay_with_other_arithmetic_is_noticed(data, fit_head, tmp_path):
    head = fit_head(data, dtype=torch.float32)
    with VerdictLearner(head, tmp_path, snapshot_every=2, backend="torch") as learner:
        states = learnt(learner, data, 3)
    line = (tmp_path / "journal.jsonl").read_text()
    other = line.replace(json.loads(line.splitlines()[1])["state"], "0" * 64)
    (tmp_path / "journal.jsonl").write_text(other)
    with VerdictLearner(head, tmp_path, backend="torch") as learner:
        with pytest.raises(CheckpointError, match="version 1, replayed from version 0, has other bits"):
            learner.revert(1)
        assert learner.version == 3
        assert bits(learner.revert(2)) == states[2]


def test_others_read_every_version_while_the_writer_writes(data, head, fit_head, tmp_path):
    with VerdictLearner(head, tmp_path, snapshot_every=2) as learner:
        states = learnt(learner, data, 3)
        for version in (0, 3, 1, 2):
            found, number = read_version(head, tmp_path, version)
            assert (number, bits(found)) == (version, states[version])
        learner.revert(1)
        found, number = read_version(learner.head, tmp_path)  # from any of its versions; the current one
        assert (number, bits(found)) == (1, states[1])
        file = tmp_path / "journal.jsonl"
        with file.open("ab") as stream:
            stream.write(b'{"event": "upd')  # the writer is at it
        size = file.stat().st_size
        assert read_version(head, tmp_path)[1] == 1
        assert file.stat().st_size == size
        with pytest.raises(InputError, match="a number from 0 to 3"):
            read_version(head, tmp_path, 4)
    with pytest.raises(CheckpointError, match="no version"):
        read_version(head, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(CheckpointError, match="another head"):
        read_version(fit_head(data, dtype=torch.bfloat16, seed=1), tmp_path)


def test_who_follows_a_journal_serves_each_version_once(data, head, tmp_path):
    served, came = [], queue.Queue()

    def publish(version):
        served.append(version)
        came.put(version)
        if served == [0, 1]:
            raise OSError("the folder is away")  # is tried again

    with VerdictLearner(head, tmp_path) as learner:
        watch = JournalWatch(tmp_path)
        assert watch.current() == 0
        with following(tmp_path, publish, every_s=0.005):
            assert came.get_nowait() == 0
            learner.learn(batch(data, 0))
            assert watch.current() == 1
            assert [came.get(timeout=60), came.get(timeout=60)] == [1, 1]
            learner.revert(0)
            assert came.get(timeout=60) == 0
        assert served == [0, 1, 1, 0]
        learner.learn(batch(data, 1))
    assert served == [0, 1, 1, 0]
    assert JournalWatch(tmp_path / "nothing").current() is None
    engine = RewardEngine(head)
    with following(tmp_path, served_from(tmp_path, engine)):
        assert engine.head_version == 2


def test_an_engine_serves_what_another_learns_and_says_which_version(data, head, tmp_path):
    sizes = [3, 2]
    engine = RewardEngine(head)
    assert engine.score_hidden(data.hidden[:5], sizes)[0].head_version is None
    with VerdictLearner(head, tmp_path) as learner:
        learner.learn(batch(data, 0))
        engine.serve_head(*read_version(head, tmp_path))
        scores = engine.score_hidden(data.hidden[:5], sizes)
        own = RewardEngine(head, learner=learner)
        assert [scores.head_version, *(group.head_version for group in scores)] == [1, 1, 1]
        mine = own.score_hidden(data.hidden[:5], sizes)
        assert mine.head_version == 1
        for one, other in zip(scores, mine, strict=True):
            assert torch.equal(one.preference, other.preference)
        own.revert(0)
        assert own.score_hidden(data.hidden[:5], sizes).head_version == 0
        with pytest.raises(InputError, match="there is one writer"):
            own.serve_head(head, 0)


def test_an_engine_refuses_the_head_of_another(data, head, fit_head):
    with pytest.raises(InputError, match="other features"):
        RewardEngine(head).serve_head(fit_head(data, dtype=torch.bfloat16, seed=1), 1)


def test_a_journal_has_one_writer(head, tmp_path):
    with (
        VerdictLearner(head, tmp_path) as learner,
        pytest.raises(InputError, match="another learner has open"),
    ):
        VerdictLearner(head, tmp_path)
    with pytest.raises(InputError, match="was closed"):
        learner.revert(0)
    VerdictLearner(head, tmp_path).close()
    assert Journal(tmp_path).versions[0].number == 0


def test_what_a_learner_refuses(data, head, hand_head, tmp_path):
    with pytest.raises(InputError, match=r"head\.posterior: got no data"):
        VerdictLearner(hand_head([1.0, 0.0]), tmp_path / "a")
    with pytest.raises(InputError, match="snapshot_every: got 0"):
        VerdictLearner(head, tmp_path / "b", snapshot_every=0)
    with VerdictLearner(head, tmp_path / "c") as learner:
        for version in (1, -1, True, "0"):
            with pytest.raises(InputError, match="version: got"):
                learner.revert(version)
        bad = batch(data, 0)
        hidden = bad.hidden.clone()
        hidden[5] = torch.inf
        before = bits(learner.head)
        with pytest.raises(InputError, match=r"1 of 300 rows \(5\)"):
            learner.learn(replace(bad, hidden=hidden))
        assert (learner.version, bits(learner.head)) == (0, before)


# -- the engine ------------------------------------------------------------------------------------------------------

PROMPTS = ["p", "q"]
RESPONSES = [["a", "b", "c"], ["d", "e"]]


def recorded_judge(reverse=False):
    """Prefers the later letter, or the earlier one."""
    rows = []
    for prompt, group in zip(PROMPTS, RESPONSES, strict=True):
        for i, first in enumerate(group):
            rows += [
                {"prompt": prompt, "first": first, "second": second, "verdict": "win" if reverse else "loss"}
                for second in group[i + 1 :]
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
