"""Stand-ins for servers of states, in the forms that their documentation and sources give, over a local body.

vLLM (docs.vllm.ai, "Pooling Models"; ``vllm/entrypoints/pooling/pooling/protocol.py``): a PoolingCompletionRequest has
``model``, ``input: list[int] | list[list[int]] | str | list[str]``, ``task``, ``use_activation`` ("Whether to use
activation for the pooler outputs. `None` uses the pooler's default, which is `True` in most cases."),
``encoding_format``, ``embed_dtype`` and ``endianness``. A PoolingResponse is ``id``, ``object: "list"``, ``created``,
``model``, ``data: list[PoolingResponseData]``, ``usage``; a PoolingResponseData is ``index``, ``object: "pooling"``,
``data: list[list[float]] | list[float] | str``.

SGLang (``examples/runtime/hidden_states/hidden_states_server.py``): ``POST /generate`` with ``"return_hidden_states":
True`` gives a list of outputs with ``output["meta_info"]["hidden_states"]``, the prompt's states as a list of lists and
then one list a generated token.

llama.cpp (``tools/server/README.md``, "POST /embedding: non-OpenAI-compatible embeddings API"; as its server answers in
tests/model/test_remote_live.py): ``content`` of texts or tokens and ``embd_normalize``, where -1 is none; a list of
``index`` and ``embedding``, a list of lists: all tokens' with ``--pooling none``, else one.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import torch
from torch import Tensor


class StateServer(httpx.MockTransport):
    """Answers as vLLM and SGLang do.

    Args:
        body: a Hugging Face body.
        failures: statuses of the first replies, before it begins to work.
        dtype: what states are rounded to, as a server computes in it.
        cached: tokens of each prompt whose states SGLang's prefix cache keeps back.
        normalises: whether it is a vLLM that does not know ``use_activation`` on ``/pooling``.

    ``spoil`` may be set to a function of a reply, whose result is sent instead; ``gone_after`` to the number of
    requests after which nobody answers, ``pools_last`` to whether it is a llama.cpp with ``--pooling last``.
    """

    def __init__(
        self,
        body: Any,
        *,
        failures: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32,
        cached: int = 0,
        normalises: bool = False,
    ) -> None:
        super().__init__(self._answer)
        self.body = body
        self.failures = list(failures)
        self.dtype = dtype
        self.cached = cached
        self.normalises = normalises
        self.spoil: Callable[[Any], Any] = lambda reply: reply
        self.gone_after: int | None = None
        self.pools_last = False
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self._lock = threading.Lock()

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.keys.append(request.headers.get("authorization"))
        if request.url.path == "/v1/models":
            model = {"id": "served", "object": "model", "max_model_len": self.body.config.max_position_embeddings}
            return httpx.Response(200, json={"object": "list", "data": [model]})
        payload = json.loads(request.content)
        with self._lock:
            self.requests.append(payload)
            if self.gone_after is not None and len(self.requests) > self.gone_after:
                raise httpx.ConnectError("refused")
            if self.failures:
                error = {"error": {"message": "overloaded", "type": "ServiceUnavailable", "code": self.failures[0]}}
                return httpx.Response(self.failures.pop(0), json=error, headers={"retry-after": "1"})
        answer = {"/pooling": self._pooling, "/generate": self._generate, "/embedding": self._embedding}.get(
            request.url.path
        )
        if answer is None:
            return httpx.Response(404)
        return httpx.Response(200, content=json.dumps(self.spoil(answer(payload))))  # NaN as Python's servers write it

    def _states(self, ids: list[int]) -> Tensor:
        with torch.no_grad():
            return self.body(input_ids=torch.tensor([ids])).last_hidden_state[0].to(self.dtype).float()

    def _pooling(self, payload: dict[str, Any]) -> dict[str, Any]:
        assert payload["model"] == "served"
        assert payload["task"] in ("embed", "token_embed")
        activated = self.normalises or payload.get("use_activation") is not False
        data: list[dict[str, Any]] = []
        for index, ids in enumerate(payload["input"]):
            states = self._states(ids)
            states = states if payload["task"] == "token_embed" else states[-1]
            states = torch.nn.functional.normalize(states, dim=-1) if activated else states
            held: Any = states.tolist()
            if payload.get("encoding_format") == "base64":
                assert (payload["embed_dtype"], payload["endianness"]) == ("float32", "little")
                held = base64.b64encode(states.numpy().astype("<f4").tobytes()).decode()
            data.append({"index": index, "object": "pooling", "data": held})
        usage = {"prompt_tokens": sum(map(len, payload["input"])), "total_tokens": 0}
        return {"id": "pool-1", "object": "list", "created": 1, "model": "served", "data": data[::-1], "usage": usage}

    def _embedding(self, payload: dict[str, Any]) -> list[dict[str, Any]]:
        assert payload["embd_normalize"] == -1
        held = [self._states(ids) for ids in payload["content"]]
        held = [states[-1:] if self.pools_last else states for states in held]
        return [{"index": k, "embedding": states.tolist()} for k, states in enumerate(held)][::-1]

    def _generate(self, payload: dict[str, Any]) -> list[dict[str, Any]]:
        assert payload["return_hidden_states"] is True
        outputs = []
        for ids in payload["input_ids"]:
            states = self._states(ids)
            known = min(self.cached, len(ids) - 1)
            info = {"prompt_tokens": len(ids), "completion_tokens": 1}
            info["hidden_states"] = [states[known:].tolist(), states[-1].tolist()]
            outputs.append({"text": "a", "meta_info": info})
        return outputs
