"""``rmcore critique``: critiques beside the responses of rows, by an endpoint, a store or a model in this process."""

from __future__ import annotations

import json
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
    state = {"asked": 0, "answer": lambda number: f"{GOOD} ({number})"}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            text = state["answer"](state["asked"])
            state["asked"] += 1
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
    assert lines(tmp_path / "s.jsonl") == found


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
