"""The service against its own OpenAPI page: schemathesis makes requests of every kind and checks every answer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOKEN = "openapi-test-token"

CONFIG = """
# What JSON Schema cannot say: texts of too many tokens, a slot below k, queries that begin with their prompts.
[[operations]]
include-path = "/v1/groups"
checks.positive_data_acceptance.expected-statuses = ["2xx", "409", "422"]

[[operations]]
include-path = "/get_reward"
checks.not_a_server_error.expected-statuses = ["2xx", "4xx", "503"]  # 503: its sibling did not come, as documented
checks.positive_data_acceptance.expected-statuses = ["2xx", "422", "503"]

[[operations]]
include-path = "/v1/rendezvous"
checks.positive_data_acceptance.expected-statuses = ["2xx", "409", "410", "422"]
"""


@pytest.mark.slow
def test_schemathesis_finds_nothing(make_app, serve_app, tmp_path):
    """With the real engine, so that hostile texts reach the tokenizer too."""
    pytest.importorskip("schemathesis")
    command = shutil.which("schemathesis", path=str(Path(sys.executable).parent)) or shutil.which("schemathesis")
    if command is None:
        pytest.skip("the command schemathesis is not on the path")
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    app = make_app(group_size=2, time_limit_s=0.02, token=TOKEN, max_chars=500, max_responses=8, max_groups=8)
    with serve_app(app) as url:
        arguments = ["--config-file", "schemathesis.toml", "run", f"{url}/openapi.json", "--checks", "all"]
        # No stateful phase: the page links no operation to another, and of the one link inferred none is ever covered.
        arguments += ["--phases", "examples,coverage,fuzzing"]
        arguments += ["--max-examples", "6", "--seed", "1", "--no-color", "-H", f"Authorization: Bearer {TOKEN}"]
        done = subprocess.run([command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    statuses = {status for (path, status) in app.state.service.guard.requests if path.startswith("/v1")}
    assert {"200", "422", "401"} <= statuses


def test_every_error_is_described(make_app):
    page = make_app().openapi()
    assert set(page["paths"]) == {"/v1/groups", "/v1/rendezvous", "/get_reward", "/health", "/ready", "/metrics"}
    for path, operations in page["paths"].items():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                if int(status) >= 400 and (path, status) != ("/ready", "503"):
                    assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorReply")


def test_the_page_tells_the_limits(make_app):
    page = make_app(max_responses=5, max_chars=7, max_groups=3).openapi()
    request = page["components"]["schemas"]["GroupRequest"]["properties"]
    assert request["responses"]["maxItems"] == 5
    text = next(kind for kind in request["responses"]["items"]["oneOf"] if kind.get("type") == "string")
    assert text["maxLength"] == 7
    assert page["components"]["schemas"]["MemberRequest"]["properties"]["k"]["maximum"] == 5
