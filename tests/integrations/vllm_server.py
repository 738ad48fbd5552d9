"""A vLLM server's answers as TRL's own client reads them: random words, prompt by prompt; imported by the ranks."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from trl.generation import vllm_client, vllm_generation

EOS = 3


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    rng = random.Random(5)
    completions = 0

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "policy"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])) or b"{}")
        choices = [self._choice(ids) for ids in body.get("prompt", []) for _ in range(body["n"])]
        self._answer({"choices": choices, "success": True})

    def _choice(self, prompt_ids: list[int]) -> dict[str, Any]:
        _Handler.completions += 1
        ids = [*self.rng.choices(range(4, 26), k=self.rng.randrange(1, 5)), EOS]
        names = [f"token_id:{token}" for token in ids]
        logprobs = {"tokens": names, "token_logprobs": [-1.0] * len(ids), "top_logprobs": [None] * len(ids)}
        return {"prompt_token_ids": prompt_ids, "token_ids": ids, "logprobs": logprobs}

    def _answer(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def vllm_server(serves: bool) -> Iterator[str]:
    """Its address, if this process is the one that serves; in all, TRL takes vLLM for installed.

    TRL's client is its own but for the weights, which go to a server over NCCL.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in (vllm_client, vllm_generation):
            patch.setattr(module, "is_vllm_available", lambda *_, **__: True)
        for name in ("init_communicator", "update_named_params"):
            patch.setattr(vllm_client.VLLMClient, name, lambda *_, **__: None)
        if not serves:
            yield ""
            return
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            before = _Handler.completions
            yield f"http://127.0.0.1:{server.server_port}"
            assert _Handler.completions > before, "nobody asked it"
        finally:
            server.shutdown()
            server.server_close()
