"""NeMo-Gym's own commands start the server of examples/nemo_gym, and collect rollouts that a GenRM behind it compares.

In NeMo-Gym's environment (``make test-nemo-gym``): ``ng_run`` with the example's configuration starts a policy's
server, an agent and ours; ``ng_collect_rollouts`` sends each task four times. Policy and GenRM are one small server
here, which replays answers and prefers the longer ones.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from support.pages import ROOT
from werkzeug import Request, Response

ANSWERS = ["good clear right", "bad wrong", "good bad red tree", "kind exact helpful red house"]
TASKS = [
    {"responses_create_params": {"input": [{"role": "user", "content": "red tree"}]}},
    {
        "responses_create_params": {"input": [{"role": "user", "content": "blue river"}]},
        "principle": "Prefer the shorter one.",
    },
]

pytestmark = pytest.mark.skipif(
    "RMCORE_NEMO_GYM_PYTHON" not in os.environ, reason="no RMCORE_NEMO_GYM_PYTHON: make test-nemo-gym installs nemo-gym"
)


class Replayed:
    """Chat completions of both models; keeps the questions to the GenRM."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []
        self.answered: Counter[str] = Counter()

    def __call__(self, request: Request) -> Response:
        body = request.get_json()
        roles = {message["role"]: message["content"] for message in body["messages"]}
        if body["model"] == "genrm":
            self.asked.append(roles)
            longer = len(roles["response_1"]) > len(roles["response_2"])
            first = longer != ("shorter" in roles.get("principle", ""))
            text = json.dumps(
                {"score_1": 5 - 3 * (not first), "score_2": 5 - 3 * first, "ranking": 1 + 5 * (not first)}
            )
        else:
            prompt = str(body["messages"][-1]["content"])
            text = ANSWERS[self.answered[prompt] % len(ANSWERS)]
            self.answered[prompt] += 1
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        told = {"id": "c", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}
        return Response(json.dumps(told | {"usage": usage}), content_type="application/json")


@pytest.fixture
def folder(tmp_path) -> Path:
    """The example, with tasks, and environments where NeMo-Gym looks for them: its own, and this one for ours."""
    shutil.copytree(ROOT / "examples" / "nemo_gym", tmp_path / "gym")
    (tmp_path / "gym" / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    theirs = Path(os.path.abspath(os.environ["RMCORE_NEMO_GYM_PYTHON"])).parents[1]
    for server, prefix in (
        ("resources_servers/rmcore_genrm", Path(sys.prefix)),
        ("responses_api_agents/simple_agent", theirs),
        ("responses_api_models/vllm_model", theirs),
    ):
        (tmp_path / "venvs" / server).mkdir(parents=True)
        (tmp_path / "venvs" / server / ".venv").symlink_to(prefix)
    return tmp_path / "gym"


def _command(name: str, *arguments: str) -> list[str]:
    return [os.path.join(os.path.dirname(os.path.abspath(os.environ["RMCORE_NEMO_GYM_PYTHON"])), name), *arguments]


def _until_ready(started: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    ends = time.monotonic() + seconds
    while "3 / 3 servers ready" not in (told := log.read_text()):
        assert started.poll() is None, told[-3000:]
        assert time.monotonic() < ends, told[-3000:]
        time.sleep(0.5)


@pytest.mark.timeout(900)
def test_ng_run_starts_it_and_rollouts_are_rewarded(folder, reward_model_path, httpserver):
    replayed = Replayed()
    httpserver.expect_request("/v1/chat/completions").respond_with_handler(replayed)
    url = httpserver.url_for("/v1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        head = [f"+head_server.port={free.getsockname()[1]}", "+head_server.host=127.0.0.1"]
    names = {"rm": reward_model_path, "genrm_base_url": url, "genrm_model_name": "genrm", "policy_base_url": url}
    names |= {"policy_api_key": "none", "policy_model_name": "policy", "uv_venv_dir": folder.parent / "venvs"}
    given = [f"+{name}={str(value).replace(' ', chr(92) + ' ')}" for name, value in names.items()]
    log = folder / "started.log"
    # A cluster of its own, whatever else runs on this machine.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
    how = {"cwd": folder, "env": environment, "stderr": subprocess.STDOUT, "start_new_session": True}
    with log.open("wb") as told:
        command = _command("ng_run", "+config_paths=[genrm.yaml]", *given, *head, "+skip_venv_if_present=true")
        started = subprocess.Popen(command, stdout=told, **how)
        try:
            _until_ready(started, log, 400)
            collect = ["+agent_name=genrm_simple_agent", "+input_jsonl_fpath=tasks.jsonl", "+num_repeats=4", *head]
            collect += ["+output_jsonl_fpath=rollouts.jsonl", "+num_samples_in_parallel=8"]
            command = _command("ng_collect_rollouts", *collect, "+upload_rollouts_to_wandb=false")
            done = subprocess.run(command, stdout=subprocess.PIPE, timeout=300, check=False, **how)
            assert done.returncode == 0, done.stdout.decode()[-3000:] + log.read_text()[-3000:]
        finally:
            started.send_signal(signal.SIGINT)
            try:
                started.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert Counter(row["_ng_task_index"] for row in rows) == {0: 4, 1: 4}
    assert not any(row["mask_sample"] for row in rows)
    for task in range(2):
        mine = [row for row in rows if row["_ng_task_index"] == task]
        assert sorted(row["response"]["output"][-1]["content"][0]["text"] for row in mine) == sorted(ANSWERS)
        assert sum(row["reward"] for row in mine) == pytest.approx(12)  # four on a scale around 3
        assert {row["genrm"]["genrm_pairs"] for row in mine} == {4.0}  # a ring
        assert {row["genrm"]["genrm_pairs_asked"] + row["genrm"]["genrm_pairs_saved"] for row in mine} == {4.0}
    assert 0 < len(replayed.asked) < 8  # the GenRM was asked, and not of every pair
    principles = {question["user"]: question.get("principle") for question in replayed.asked}
    assert principles.get("red tree") is None
    assert principles.get("blue river", TASKS[1]["principle"]) == TASKS[1]["principle"]
    metrics = json.loads((folder / "rollouts_aggregate_metrics.json").read_text())
    assert "masked" in json.dumps(metrics)
