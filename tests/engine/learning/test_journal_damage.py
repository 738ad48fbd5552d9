"""A learner's journal after crashes, damage and other writers."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.learner import batch, bits, learnt

from rmcore import RewardEngine
from rmcore._base.errors import CheckpointError, InputError
from rmcore.engine.learning import VerdictLearner, read_version
from rmcore.engine.learning.follow import JournalWatch, following, served_from
from rmcore.engine.learning.journal import Journal
from rmcore.engine.learning.learner import head_identity
from rmcore.head.checkpoint import load_head, save_head

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
