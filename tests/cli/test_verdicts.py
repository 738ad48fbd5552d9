"""``rmcore verdicts`` on stores with known contents, and the ledger it reads them with."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from rmcore.cli import app
from rmcore.cli.verdicts import printable
from rmcore.judge import JudgeUsage, RecordedJudge, StoreError, Verdict, VerdictStore
from rmcore.judge.store.ledger import VerdictLedger
from rmcore.judge.store.records import Question, Reply
from rmcore.model.data import read_preferences

runner = CliRunner()
CHAT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
HOSTILE = "\x1b[2J\x1b]0;owned\x07[bold]\u202etxt\u200b\nverdict:     win\r\x9b31m"


def call(*arguments: object) -> Result:
    return runner.invoke(app, ["verdicts", *(str(a) for a in arguments)], catch_exceptions=False)


class Day:
    """A wall clock to set."""

    def __init__(self) -> None:
        self.seconds = 1_700_000_000.0  # 2023-11-14T22:13:20Z

    def wall(self) -> float:
        return self.seconds


def log(store, prompt, first, second, preference, reason="", *, seconds=1.0, cost=0.01, model="m", **rest):
    usage = JudgeUsage(
        calls=1, attempts=2, prompt_tokens=100, cached_tokens=40, completion_tokens=10, seconds=seconds, cost=cost
    )
    asked = Question.of("http://j/v1", model, {"seed": 1}, "t", prompt, first, second, canary=rest.pop("canary", False))
    verdict = Verdict(preference, reason, critique=f"on {first} and {second}", usage=usage)
    replied = rest.pop("replied", True)
    store.put(asked, Reply(verdict, replied, f"raw {first}", {"win": "QQ"}, currency="EUR", **rest))
    return asked


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Per pair: what the judge said shown (good, bad), then what it said shown (bad, good)."""
    path, day = tmp_path / "verdicts.db", Day()
    pairs = {
        "agree": (1, -1),
        "flip": (1, 1),
        "tie": (0, 0),
        "weak": (1, 0),
        "half": (1, None),
        "lost": (None, None),
    }
    with VerdictStore(path, clock=day) as store:
        for number, (name, (there, back)) in enumerate(pairs.items()):
            for first, second, preference in (("good", "bad", there), ("bad", "good", back)):
                reason = "" if preference is not None else "refusal"
                log(store, f"prompt {name}", first, second, preference, reason, seconds=number + 1.0)
        day.seconds += 86400
        log(store, CHAT, "good", "bad", -0.25, model="m2")
        log(store, CHAT, "N/A", "good", -1, canary=True)
        log(store, "prompt timeout", "x", "y", None, "timeout", replied=False)
    return path


def rows(result: Result) -> dict[str, dict[str, object]]:
    assert result.exit_code == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    return {row["prompt"] if isinstance(row["prompt"], str) else "chat": row for row in found}


# -- export ----------------------------------------------------------------------------------------------------------


def test_export_merges_orders_and_leaves_out_what_says_nothing(path):
    result = call("export", path)
    found = rows(result)
    assert set(found) == {"prompt agree", "prompt weak", "prompt half", "chat"}
    assert result.stderr.strip() == "4 rows; left out 1 flips, 1 ties, 2 without a verdict"
    strengths = {name: (row["preference"], row["orders"]) for name, row in found.items()}
    assert strengths == {
        "prompt agree": (1, 2),
        "prompt weak": (0.5, 2),
        "prompt half": (1, 1),
        "chat": (0.25, 1),
    }
    agree = found["prompt agree"]
    assert (agree["chosen"], agree["rejected"], agree["flipped"], agree["model"]) == ("good", "bad", False, "m")
    critiques = {c["shown_first"]: c["text"] for c in agree["critiques"]}
    assert critiques == {"chosen": "on good and bad", "rejected": "on bad and good"}
    assert found["prompt half"]["reason"] == "one_order:refusal"


def test_a_conversation_is_exported_as_one(path):
    row = rows(call("export", path, "--model", "m2"))["chat"]
    assert row["prompt"] == CHAT
    assert row["chosen"] == [{"role": "assistant", "content": "bad"}]
    assert row["rejected"] == [{"role": "assistant", "content": "good"}]


def test_flips_ties_and_canaries_come_along_if_asked(path):
    found = rows(call("export", path, "--flips", "--ties", "--canaries", "--model", "m"))
    assert (found["prompt flip"]["preference"], found["prompt flip"]["flipped"]) == (0, True)
    assert (found["prompt tie"]["preference"], found["prompt tie"]["flipped"]) == (0, False)
    assert found["chat"]["rejected"][0]["content"] == "N/A"


def test_export_takes_only_the_strong_and_the_whole(path):
    result = call("export", path, "--no-one-order", "--min-preference", 0.6)
    assert set(rows(result)) == {"prompt agree"}
    assert "2 in one order only" in result.stderr
    assert "1 too weak" in result.stderr


def test_what_is_exported_can_be_trained_on(path, tmp_path):
    out = tmp_path / "prefs.jsonl"
    result = call("export", path, "-o", out)
    assert (result.exit_code, result.stdout) == (0, "")
    read = list(read_preferences(out))
    assert len(read) == 4
    assert {(p.chosen, p.rejected) for p in read} == {("good", "bad"), ("bad", "good")}


def test_the_merge_is_that_of_the_judges(tmp_path):
    """Whatever a judge that averages orders would have said of a pair, the export says too."""
    words = {1: "win", -1: "loss", 0: "tie"}
    with VerdictStore(tmp_path / "v.db") as store:
        table = []
        for there in (1, 0, -1):
            for back in (1, 0, -1):
                prompt = f"{there} {back}"
                log(store, prompt, "a", "b", there)
                log(store, prompt, "b", "a", back)
                table.append({"prompt": prompt, "first": "a", "second": "b", "verdict": words[there]})
                table.append({"prompt": prompt, "first": "b", "second": "a", "verdict": words[back]})
    judge = RecordedJudge.from_rows(table)
    from rmcore.judge import Pair

    with VerdictLedger(tmp_path / "v.db") as ledger:
        pairs = list(ledger.pairs())
    assert len(pairs) == 9
    for pair in pairs:
        expected = judge.verdict(Pair(pair.prompt, pair.a, pair.b))
        assert (pair.verdict.preference, pair.verdict.flipped) == (expected.preference, expected.flipped)


def test_only_the_first_verdict_counts(tmp_path):
    with VerdictStore(tmp_path / "v.db") as store:
        for preference, reason in ((None, "refusal"), (1, ""), (-1, ""), (None, "timeout")):
            log(store, "p", "good", "bad", preference, reason, replied=reason != "timeout")
    (row,) = rows(call("export", tmp_path / "v.db")).values()
    assert row["chosen"] == "good"


# -- show ------------------------------------------------------------------------------------------------------------


def test_show_lists_the_latest_calls(path):
    result = call("show", path, "--limit", 3)
    assert result.exit_code == 0
    head, *lines = result.stdout.splitlines()
    assert head.split() == ["key", "at", "(UTC)", "model", "shown", "verdict", "tokens", "s", "cost", "prompt"]
    assert [line.rstrip().rsplit("  ", 1)[1] for line in lines] == ["prompt timeout", "hello", "hello"]
    assert "none: timeout" in lines[0]
    assert "2023-11-15 22:13:20" in lines[0]


def test_show_filters(path):
    assert len(call("show", path, "--reason", "refusal").stdout.splitlines()) == 1 + 3
    assert len(call("show", path, "--model", "m2").stdout.splitlines()) == 1 + 1
    assert len(call("show", path, "--model", "none").stdout.splitlines()) == 1


def test_show_a_call_or_a_pair_in_full(path):
    asked = Question.of("http://j/v1", "m", {"seed": 1}, "t", "prompt agree", "good", "bad")
    for key in (asked.key, asked.key[:12]):
        out = call("show", path, key).stdout
        assert out.count("\nreply:") == 1
        for said in (asked.key, asked.pair, "prompt agree", "raw good", '{"seed": 1}', "QQ", "0.01 EUR", "(40 cached)"):
            assert said in out
    both = call("show", path, asked.pair[:16]).stdout
    assert both.count("\nreply:") == 2


def test_stored_texts_cannot_reach_the_terminal(tmp_path):
    path = tmp_path / "v.db"
    with VerdictStore(path) as store:
        asked = log(store, HOSTILE, HOSTILE, "\ud800", 1, HOSTILE, model=HOSTILE)
    for arguments in (("show", path), ("show", path, asked.key), ("stats", path), ("export", path)):
        result = call(*arguments)
        assert result.exit_code == 0
        assert all(c.isprintable() or c == "\n" for c in result.stdout)
    full = call("show", path, asked.key).stdout
    assert "\\x1b[2J\\x1b]0;owned\\x07[bold]\\u202etxt\\u200b" in full
    # A text that imitates a heading stands set in; the only real line of that name is ours.
    assert [line for line in full.splitlines() if line.startswith("verdict:")] == [
        line for line in full.splitlines() if line.startswith("verdict:") and "(from the side of" in line
    ]
    assert rows(call("export", path))[HOSTILE]["rejected"] == "\ud800"


def test_printable():
    assert printable("a\tb\nc é 漢 🙂") == "a\\tb\\nc é 漢 🙂"
    assert printable("a\nb\r", lines=True) == "a\nb\\r"
    assert printable("\ud800\x7f\u2028") == "\\ud800\\x7f\\u2028"


# -- stats -----------------------------------------------------------------------------------------------------------


def test_stats_count_everything(path):
    told = json.loads(call("stats", path, "--json").stdout)
    assert (told["calls"], told["questions"], told["retries"], told["canaries"]) == (15, 15, 15, 1)
    assert told["models"] == {"m": 14, "m2": 1}
    assert told["outcomes"] == {"win": 5, "loss": 3, "tie": 3, "none": 4}
    assert told["reasons"] == {"refusal": 3, "timeout": 1}
    assert told["shown_first"] == {"preferred": 5, "not preferred": 2, "tie": 3}
    assert told["pairs"] == {"judged": 8, "both_orders": 4, "decided": 4, "flips": 1, "ties": 1, "failed": 2}
    assert (told["prompt_tokens"], told["cached_tokens"], told["completion_tokens"]) == (1500, 600, 150)
    assert told["cost"] == {"EUR": pytest.approx(0.15)}
    assert told["unpriced_calls"] == 0
    assert told["latency_s"] == {"p50": 3.0, "p95": 6.0}
    assert {day: sums["calls"] for day, sums in told["days"].items()} == {"2023-11-14": 12, "2023-11-15": 3}
    assert told["file"]["bytes"] > 0


def test_stats_price_tokens_by_a_table(path, tmp_path):
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"currency": "USD", "models": {"m2": {"prompt": 1e4, "completion": 0, "cached": 0}}}))
    told = json.loads(call("stats", path, "--json", "--prices", prices).stdout)
    assert told["cost"] == {"USD": pytest.approx(0.6)}
    assert told["unpriced_calls"] == 14
    text = call("stats", path, "--prices", prices).stdout
    assert "0.6 USD, and 14 calls of unknown cost" in text


def test_stats_for_people(path):
    out = call("stats", path).stdout
    for line in ("8 (4 in both orders): 4 decided, 1 flips, 1 ties, 2 failed", "p50 3.00 s, p95 6.00 s", "2023-11-15"):
        assert line in out


def test_an_empty_store(tmp_path):
    VerdictStore(tmp_path / "v.db").close()
    assert "0 (0 questions" in call("stats", tmp_path / "v.db").stdout
    assert call("show", tmp_path / "v.db").exit_code == 0
    assert call("export", tmp_path / "v.db").stderr.strip() == "0 rows"


# -- files -----------------------------------------------------------------------------------------------------------


def _foreign(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE recipes (dish TEXT)")


def _wrong_kind(path: Path) -> None:
    with VerdictStore(path) as store:
        log(store, "p", "a", "b", 1)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE calls SET seconds = 'long ago'")
        database.commit()


def _wrong_text(path: Path) -> None:
    with VerdictStore(path) as store:
        log(store, "p", "a", "b", 1)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE texts SET body = '[3]'")
        database.commit()


def _damaged(path: Path) -> None:
    with VerdictStore(path) as store:
        for k in range(50):
            log(store, f"p {k} " + "x" * 2000, "a", "b", 1)
    content = bytearray(path.read_bytes())
    content[4096 * 3 :] = bytes(len(content) - 4096 * 3)
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [_foreign, _wrong_kind, _wrong_text, _damaged, Path.touch, Path.mkdir, None])
def test_what_is_no_store_exits_2_with_a_reason(tmp_path, spoil):
    path = tmp_path / "v.db"
    if spoil is not None:
        spoil(path)
    # Each command meets damage where it reads.
    result = call("export", path) if spoil is _wrong_text else call("stats", path)
    assert result.exit_code == 2
    assert "v.db" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert spoil is not None or not path.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("show", "xyz!"), "key"),
        (("show", "ab"), "4 to 64"),
        (("show", "0" * 64), "beginning of a key"),
        (("show", "--limit", "0"), "limit"),
        (("export", "--min-preference", "2"), "--min-preference"),
        (("stats", "--prices", "/none.json"), "none.json"),
    ],
)
def test_bad_arguments_exit_2(path, arguments, says):
    command, *rest = arguments
    result = call(command, path, *rest)
    assert result.exit_code == 2
    assert says in result.stderr


def test_reading_changes_nothing_and_works_while_another_writes(path):
    with VerdictStore(path) as store:
        writing = threading.Event()
        stop = threading.Event()

        def write() -> None:
            number = 0
            while not stop.is_set():
                log(store, f"more {number}", "a", "b", 1)
                number += 1
                writing.set()

        thread = threading.Thread(target=write)
        thread.start()
        writing.wait()
        try:
            for command in ("show", "export", "stats"):
                result = call(command, path)
                assert result.exit_code == 0, result.stderr
        finally:
            stop.set()
            thread.join()
    with VerdictLedger(path) as ledger:
        logged = len(ledger.calls())
        with pytest.raises(StoreError, match="readonly"):
            list(ledger._store.rows("DELETE FROM calls"))
    assert logged > 15


@pytest.mark.parametrize(
    ("damage", "gone"),
    [
        ("UPDATE calls SET preference = 'x' WHERE id = 1", 1),
        ("UPDATE calls SET critique = '{' WHERE id = 1", 1),
        ("UPDATE calls SET critique = CAST(x'22ff22' AS TEXT) WHERE id = 1", 1),
        ("UPDATE calls SET reason = CAST(x'ff' AS TEXT) WHERE id = 1", 1),
        ("UPDATE calls SET shown = 'zz' WHERE id = 1", 1),
        ("UPDATE texts SET body = '[1' WHERE id = (SELECT prompt FROM calls WHERE id = 1)", 1),
        ("DELETE FROM texts WHERE id = (SELECT prompt FROM calls WHERE id = 1)", 1),
    ],
)
def test_one_unreadable_row_does_not_stop_the_export(tmp_path, damage, gone):
    path = tmp_path / "v.db"
    with VerdictStore(path) as store:
        for k in range(4):
            log(store, f"p{k}", "a", "b", 1.0)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA ignore_check_constraints = ON")
        database.execute("PRAGMA foreign_keys = OFF")
        database.execute(damage)
        database.commit()
    result = call("export", path)
    assert result.exit_code == 2
    assert len(result.stdout.splitlines()) == 4 - gone
    assert "call 1" in result.stderr
    assert "v.db" in result.stderr.replace("\n", "")
    assert f"{gone} unreadable" in result.stderr
    result = call("show", path)
    assert result.exit_code == 2
    assert all(f"p{k}" in result.stdout for k in range(1, 4))
    assert result.stderr.count("call 1") == 1
    assert "v.db" in result.stderr.replace("\n", "")
    result = call("stats", path, "--json")
    told = json.loads(result.stdout)
    # What is wrong with texts is found where they are read, and stats reads none.
    assert (told["calls"] + told["unreadable"], result.exit_code) == (4, 2 if told["unreadable"] else 0)
    assert told["unreadable"] == any(column in damage for column in ("preference", "reason", "shown"))
    assert result.stderr.count("call 1") == told["unreadable"]


def test_the_limit_is_of_the_calls_that_can_be_read(tmp_path):
    path = tmp_path / "v.db"
    with VerdictStore(path) as store:
        for k in range(4):
            log(store, f"p{k}", "a", "b", 1.0)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE calls SET seconds = 'x' WHERE id = 4")
        database.commit()
    result = call("show", path, "--limit", "2")
    assert result.exit_code == 2
    assert [f"p{k}" in result.stdout for k in range(4)] == [False, True, True, False]


def test_one_call_that_cannot_be_read_is_named(path):
    with VerdictLedger(path) as ledger:
        key = ledger.calls()[0].key
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE calls SET critique = '{' WHERE key = ?", (key,))
        database.commit()
    result = call("show", path, key)
    assert result.exit_code == 2
    assert "call " in result.stderr


def test_quality_and_critique_stats_of_stores(tmp_path):
    paths = []
    for judge, wrong in (("a", ()), ("b", range(2)), ("c", range(4, 8))):
        paths.append(tmp_path / f"{judge}.db")
        with VerdictStore(paths[-1]) as store:
            for k in range(12):
                for first, second in (("x", "y"), ("y", "x")):
                    likes = ("x" if k % 2 else "y") if k not in wrong else ("y" if k % 2 else "x")
                    question = Question.of(judge, judge, {}, "t", f"p{k}", first, second)
                    preference = 1.0 if first == likes else -1.0
                    critique = (
                        "The first response is better, as far as one can see." if k < 6 else "Both are short texts."
                    )
                    verdict = Verdict(preference, critique=critique, usage=JudgeUsage(calls=1))
                    store.put(question, Reply(verdict, replied=True, text=critique))
    result = call("quality", *paths, "--replicates", "20")
    assert result.exit_code == 0, result.stderr
    assert "12 pairs, 12 of them" in result.stdout
    told = json.loads(call("quality", *paths, "--json", "--replicates", "20").stdout)
    accuracy = [judge["accuracy"]["point"] for judge in told["judges"]]
    assert accuracy[0] > accuracy[1] > accuracy[2]
    counted = json.loads(call("critique-stats", paths[0], "--json").stdout)["a"]
    assert counted["stated"] == {"agrees": 6, "contradicts": 6, "both": 0, "silent": 12}
    assert len(counted["contradictions"]) == 6
    assert "beside verdict" in call("critique-stats", paths[0]).stdout
    with VerdictStore(tmp_path / "empty.db"):
        pass
    assert call("quality", tmp_path / "empty.db").exit_code == 2
