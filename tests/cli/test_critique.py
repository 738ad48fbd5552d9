"""``rmcore critique``: critiques beside the responses of rows, by an endpoint, a store or a model in this process."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from rmcore.cli import app
from rmcore.judge.critics.chat import ChatCritic

GOOD = "It answers what was asked, though the second sentence claims more than the first one shows."


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def endpoint():
    """Answers every question by a function of its number."""
    state = {"asked": 0, "answer": lambda number: f"{GOOD} ({number})", "down": lambda number: False}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            number = state["asked"]
            state["asked"] += 1
            if state["down"](number):
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            text = state["answer"](number)
            choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            body = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    yield state, ["--judge-url", url, "--judge-model", "m", "--judge-key-env", "", "--judge-concurrency", 1]
    server.shutdown()
    server.server_close()


def test_rows_come_back_with_critiques_and_a_run_goes_on_where_it_was(endpoint, tmp_path):
    state, asking = endpoint
    rows = [{"prompt": f"p{k}", "responses": ["one", "two"], "id": k, "more": "kept"} for k in range(20)]
    rows.append({"prompt": "p", "chosen": "good", "rejected": "bad"})
    source, out, store = write(tmp_path / "r.jsonl", rows), tmp_path / "o.jsonl", tmp_path / "c.db"
    given = ["critique", source, *asking, "--store", store, "-o", out]
    stopped = call(*given, "--max-calls", 40)
    assert stopped.exit_code == 1
    assert "--resume goes on" in stopped.stderr
    assert state["asked"] == 32
    assert not out.exists()
    done = call(*given, "--resume")
    assert done.exit_code == 0, done.stderr
    assert state["asked"] == 42
    found = lines(out)
    assert [row["line"] for row in found] == list(range(1, 22))
    assert all(row["more"] == "kept" and [len(own) for own in row["critiques"]] == [1, 1] for row in found[:20])
    assert found[20]["critiques"]["chosen"][0].startswith(GOOD)
    # What is there is of this input, or it is not gone on with.
    whole = out.read_text()
    other = [*rows[:20], {**rows[20], "chosen": "of another input"}]
    for read, said in (
        (other, "another row for line 21"),
        (rows[:5], "line 6: got a result of line 6 of an input that ends with line 5"),
    ):
        refused = call("critique", write(tmp_path / "other.jsonl", read), *asking, "-o", out, "--resume")
        assert refused.exit_code == 2
        assert said in refused.stderr
        assert out.read_text() == whole
        assert state["asked"] == 42
        (tmp_path / "o.jsonl.partial").unlink(missing_ok=True)
    assert call(*given, "--resume").exit_code == 0
    assert out.read_text() == whole
    again = call(*given, "--overwrite")
    assert "42 from the store" in again.stderr
    assert lines(out) == found
    stored = call("critique", source, "--from-store", store, "-o", tmp_path / "s.jsonl")
    assert stored.exit_code == 0, stored.stderr
    told = [[{**row, "digest": ""} for row in rows] for rows in (lines(tmp_path / "s.jsonl"), found)]
    assert told[0] == told[1], "but for who wrote them"


def test_junk_and_failures_are_counted_and_no_row_is_lost(endpoint, tmp_path):
    state, asking = endpoint
    said = ["yes", GOOD, "", "word " * 200, GOOD, "one two three four"]
    state["answer"] = lambda number: said[number]
    rows = [{"prompt": "p", "responses": ["a", "b"], "id": k} for k in range(3)]
    out = tmp_path / "o.jsonl"
    result = call("critique", write(tmp_path / "r.jsonl", rows), *asking, "--drop-junk", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert "1 no_content" in result.stderr
    for word in ("1 short", "1 repeats"):
        assert word in result.stderr
    assert sum(len(own) for row in lines(out) for own in row["critiques"]) == 3
    assert len(lines(out)) == 3


def test_one_source_and_no_options_of_verdicts(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rows = write(tmp_path / "r.jsonl", [{"prompt": "p", "responses": ["a"]}])
    url = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m", "--judge-key-env", ""]
    for given, says in (
        ([], "one of them"),
        ([*url, "--generate", "x"], "one of them"),
        ([*url, "--judge-soft"], "gives no verdict"),
        (["--generate", tmp_path / "none"], "cannot be loaded"),
        (["--generate", "org/of-the-hub"], "cannot be loaded"),
        (["--from-store", tmp_path / "none.db"], "none.db"),
        (["--generate", "x", "--max-calls", 3], "--judge-url"),
    ):
        result = call("critique", rows, *given)
        assert result.exit_code in (1, 2), result.stderr
        assert says in result.stderr


def test_a_chunk_has_no_deadline_and_a_slow_critic_loses_nothing(endpoint, tmp_path, monkeypatch):
    """A judge's ten minutes a call would be shared by a whole chunk of critiques that are asked one after the other."""
    made = []
    real = ChatCritic.__init__

    def init(self, *args, **kwargs):
        real(self, *args, **kwargs)
        made.extend(asker.deadline_s for asker in self._askers)

    monkeypatch.setattr(ChatCritic, "__init__", init)
    _, asking = endpoint
    source = write(tmp_path / "rows.jsonl", [{"prompt": "p", "responses": ["one", "two"]}])
    assert call("critique", source, *asking, "-o", tmp_path / "out.jsonl").exit_code == 0
    assert made == [None]


@pytest.fixture
def half_down(endpoint, tmp_path):
    """A run of eight rows, of pairs in part, whose critic was down for rows 3, 4 and 7; how to go on with it."""
    state, asking = endpoint
    rows = [{"prompt": f"p{k}", "responses": ["one", "two"], "id": k} for k in range(6)]
    rows += [{"prompt": f"q{k}", "chosen": "good", "rejected": "bad"} for k in range(2)]
    state["down"] = lambda number: number in (4, 5, 7, 13)
    source, out = write(tmp_path / "r.jsonl", rows), tmp_path / "o.jsonl"
    given = ["critique", source, *asking, "--judge-retries", 0, "-o", out]
    begun = call(*given)
    assert begun.exit_code == 0, begun.stderr
    assert "4 http_503" in begun.stderr
    state["down"] = lambda number: False
    return state, rows, out, given


def test_a_critic_that_was_down_is_asked_again_for_what_failed(half_down, tmp_path):
    state, _, out, given = half_down
    before = lines(out)
    failed = {row["line"]: row["critique_failures"] for row in before if "critique_failures" in row}
    assert failed == {
        3: [["http_503"], ["http_503"]],
        4: [[], ["http_503"]],
        7: {"chosen": [], "rejected": ["http_503"]},
    }
    state["down"] = lambda number: number == 17
    again = call(*given, "--resume")
    assert again.exit_code == 0, again.stderr
    assert "asked 3 rows again whose critiques had failed: 2 of them are whole now" in again.stderr
    assert state["asked"] == 16 + 6, "these rows and no others"
    found = lines(out)
    assert [row["line"] for row in found if "critique_failures" in row] == [3]
    assert [row["line"] for row in found] == list(range(1, 9))
    kept = [k for k in range(8) if k + 1 not in failed]
    for k in kept:
        assert {**found[k], "digest": ""} == {**before[k], "digest": ""}
    state["down"] = lambda number: False
    assert "asked 1 rows again" in call(*given, "--resume").stderr
    whole = lines(out)
    assert all(len(own) == 1 for row in whole[:6] for own in row["critiques"])
    content = out.read_bytes()
    assert call(*given, "--resume").exit_code == 0
    assert out.read_bytes() == content, "nothing is asked again that did not fail"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["o.jsonl", "r.jsonl"]


def test_what_was_mended_before_the_budget_ended_is_kept(half_down):
    state, rows, out, given = half_down
    write(given[1], rows + [{"prompt": f"more {k}", "responses": ["one", "two"]} for k in range(20)])
    stopped = call(*given, "--resume", "--max-calls", 20)
    assert stopped.exit_code == 1
    assert "the budget ended before the rows did" in stopped.stderr
    assert re.search(r"did \(\d+ of \d+ calls[^,]* spent, and \d+ set aside for each to come\)", stopped.stderr)
    assert "asked 3 rows again whose critiques had failed: 3 of them are whole now" in stopped.stderr
    asked = state["asked"]
    done = call(*given, "--resume")
    assert done.exit_code == 0, done.stderr
    assert state["asked"] == asked + 40
    assert [row["line"] for row in lines(out)] == list(range(1, 29))
    assert not any("critique_failures" in row for row in lines(out))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: found[1]["critiques"][0].append("made up"), "line 2: got a result that is not what was written"),
        (lambda found: found[3].pop("critique_failures"), "line 4: got a result that is not what was written"),
        (lambda found: found.pop(4), "line 5: got a result that is not what was written of line 6"),
        (lambda found: found[2].update(prompt="another"), "line 3: got another row for line 3"),
        (lambda found: found[5].update(digest="0123abcd-" + "0" * 16), "line 6: got a result of another model"),
        (lambda found: found[5].pop("digest"), "line 6: got a result of another model"),
    ],
)
def test_rows_that_are_not_what_was_written_are_refused_by_line(half_down, change, says):
    state, _, out, given = half_down
    found = lines(out)
    change(found)
    content = "".join(json.dumps(row) + "\n" for row in found)
    out.write_text(content)
    asked = state["asked"]
    refused = call(*given, "--resume")
    assert refused.exit_code == 2
    assert says in refused.stderr
    assert out.read_text() == content
    assert state["asked"] == asked, "found before anything is asked"


def test_other_options_of_the_critic_are_refused_and_another_address_is_not(half_down, tmp_path):
    _, _, out, given = half_down
    template = tmp_path / "t.txt"
    template.write_text("$contract $prompt $first")
    for more in (["--samples", 2], ["--max-chars", 50], ["--drop-junk"], ["--judge-template", template]):
        refused = call(*given, "--resume", *more)
        assert refused.exit_code == 2
        assert "line 1: got a result of another model, or of other options" in refused.stderr, more
    moved = [word.replace("127.0.0.1", "localhost") if isinstance(word, str) else word for word in given]
    assert moved != given
    assert call(*moved, "--resume", "--judge-concurrency", 2, "--store", tmp_path / "c.db").exit_code == 0
    assert not any("critique_failures" in row for row in lines(out))


def test_rows_of_before_there_were_digests_are_gone_on_with_and_that_is_said(half_down, caplog):
    _, rows, out, given = half_down
    old = [
        {name: value for name, value in row.items() if name not in ("digest", "critique_failures")}
        for row in lines(out)
    ]
    out.write_text("".join(json.dumps(row) + "\n" for row in old))
    write(given[1], [*rows, {"prompt": "one more", "responses": ["one", "two"]}])
    done = call(*given, "--resume")
    assert done.exit_code == 0, done.stderr
    assert "results without digests: only rows, and no critiques, were checked" in caplog.text
    assert len(lines(out)) == 9


def test_what_would_buy_every_critique_again_is_refused(endpoint, tmp_path):
    _, asking = endpoint
    rows = write(tmp_path / "r.jsonl", [{"prompt": "p", "responses": ["a"]}])
    for more in (["--reuse", "verdicts"], ["--ask-again", "unparsable"]):
        refused = call("critique", rows, *asking, "--store", tmp_path / "v.db", *more)
        assert refused.exit_code == 2
        assert "a critic gives no verdict" in refused.stderr


def test_columns_of_a_table_that_json_has_no_form_for(endpoint, tmp_path):
    """Dates and decimals come back as text; what no line can hold is refused by row and column, before a call."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    state, asking = endpoint
    source, out = tmp_path / "r.parquet", tmp_path / "o.jsonl"
    rows = {"prompt": ["p", "q"], "responses": [["one", "two"], ["a", "b"]]}
    day, price = pyarrow.array([0, 366], pyarrow.int32()).cast(pyarrow.date32()), pyarrow.array([1, 2])
    seen = pyarrow.array([{"at": 0}, {"at": 1}], pyarrow.struct([("at", pyarrow.timestamp("s", tz="UTC"))]))
    more = {"day": day, "price": price.cast(pyarrow.decimal128(21, 2)), "seen": seen}
    parquet.write_table(pyarrow.table({**rows, **more}), source)
    done = call("critique", source, *asking, "-o", out)
    assert done.exit_code == 0, done.stderr
    assert [(row["day"], row["price"], row["seen"]["at"][:19]) for row in lines(out)] == [
        ("1970-01-01", "1.00", "1970-01-01T00:00:00"),
        ("1971-01-02", "2.00", "1970-01-01T00:00:01"),
    ]
    asked = state["asked"]
    late = pyarrow.array([0, 9_000_000], pyarrow.int32()).cast(pyarrow.date32())
    for odd, says in ((late, "type Unreadable"), ([b"", b"\x89"], "type bytes"), ([1.0, float("nan")], "got nan")):
        parquet.write_table(pyarrow.table({**rows, "odd": odd}), source)
        refused = call("critique", source, *asking, "-o", out, "--overwrite")
        assert refused.exit_code == 2
        assert says in refused.stderr
        assert "odd: got" in refused.stderr
        assert "what a line of JSON can hold" in refused.stderr
    assert state["asked"] == asked
