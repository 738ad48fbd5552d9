"""OpenRLHF's own executor over a list of two group servers, on a CPU: siblings meet whichever server they come to.

    python examples/openrlhf_servers.py [--servers 2] [--prompts 6]

Starts ``rmcore serve`` that many times, with a reward model made on the spot, and gives OpenRLHF's
``SingleTurnAgentExecutor`` the list of their addresses, as ``--reward.remote_url A,B`` does. It sends each single
response to the next server. Printed: the advantages that OpenRLHF's ``rloo`` makes of the rewards beside
``GroupScores.advantages``, and how many responses each server passed on. Ends with a word where OpenRLHF is not
installed (``make test-trainers`` shows how).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from trl_rloo import KIND, NEUTRAL, UNKIND, make_reward_model

from rmcore import RewardEngine

K = 4


class Tokenizer:
    """Words; the executor encodes the prompt and decodes the whole."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def ids(self, text: str) -> list[int]:
        self.words += [word for word in text.split(" ") if word not in self.words]
        return [self.words.index(word) for word in text.split(" ")]

    def __call__(self, *, text: str, **_: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([self.ids(text)])}

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(self.words[k] for k in ids)


class Engine:
    """Instead of vLLM: texts prepared before, one a call."""

    def __init__(self, tokenizer: Tokenizer, texts: list[str]) -> None:
        self.tokenizer, self.left = tokenizer, list(texts)

    async def generate(self, *_: object, **__: object) -> Any:
        ids = self.tokenizer.ids(self.left.pop(0) + " </s>")
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason="stop", logprobs=None)])


def start(model: Path, ports: list[int]) -> list[subprocess.Popen[bytes]]:
    peers = ",".join(f"http://127.0.0.1:{port}" for port in ports)
    command = [sys.executable, "-m", "rmcore.cli", "serve", str(model), "--group-size", str(K), "--peers", peers]
    return [subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL) for port in ports]


def wait(port: int) -> None:
    until = time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def passed_on(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        found = re.search(r'rmcore_peer_members_total\{outcome="passed_on"\} ([\d.]+)', page.read().decode())
    return int(float(found[1])) if found else 0


def rloo(rewards: list[float]) -> list[float]:
    """As OpenRLHF's ``compute_advantages_and_returns`` does it for one prompt's samples, without KL."""
    return [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]


def run(servers: int, prompts: int) -> float:
    """The largest difference between OpenRLHF's advantages and the engine's."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    rng = random.Random(0)
    reward_model = make_reward_model(rng)
    with socket.create_server(("127.0.0.1", 0)) as one:
        base = one.getsockname()[1]
    ports = [base + k for k in range(servers)]
    with tempfile.TemporaryDirectory() as folder:
        reward_model.save_pretrained(folder, backbone="embed")
        processes = start(Path(folder), ports)
        try:
            for port in ports:
                wait(port)
            executor = SingleTurnAgentExecutor([f"http://127.0.0.1:{port}/get_reward" for port in ports])
            worst = 0.0
            for _ in range(prompts):
                prompt = " ".join(rng.choices(NEUTRAL, k=3)) + " "
                texts = [" ".join(rng.choices(KIND + UNKIND + NEUTRAL, k=4)) for _ in range(K)]
                theirs = rloo(asyncio.run(rewards_of(executor, prompt, texts)))
                ours = RewardEngine(reward_model).score([prompt], [texts])[0].advantages.tolist()
                worst = max(worst, *(abs(a - b) for a, b in zip(theirs, ours, strict=True)))
            print(f"OpenRLHF {[round(value, 4) for value in theirs]}")
            print(f"rmcore   {[round(value, 4) for value in ours]}")
            print(f"largest difference over {prompts} prompts: {worst:.1e}")
            print(f"responses passed on, by server: {[passed_on(port) for port in ports]} of {prompts * K}")
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(30)
    return worst


async def rewards_of(executor: Any, prompt: str, texts: list[str]) -> list[float]:
    tokenizer = Tokenizer()
    engine = Engine(tokenizer, texts)
    params = SimpleNamespace(max_tokens=8, logprobs=None)
    calls = [
        executor.execute(
            prompt=prompt, label="", sampling_params=params, max_length=64, hf_tokenizer=tokenizer, llm_engine=engine
        )
        for _ in texts
    ]
    outputs = await asyncio.gather(*calls)
    # The engine hands its texts out in the order of the calls.
    return [float(torch.as_tensor(output["reward"]).flatten()[0]) for output in outputs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=6)
    args = parser.parse_args()
    try:
        import openrlhf.utils.agent  # noqa: F401
    except ImportError as error:
        print(
            f"{error.name} is not installed, so there is nothing to show: make test-trainers says how it is",
            file=sys.stderr,
        )
        return 0
    return 0 if run(args.servers, args.prompts) < 1e-2 else 1


if __name__ == "__main__":
    raise SystemExit(main())
