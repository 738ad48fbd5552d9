"""The completion call as an argument: how a model of any kind answers messages, and adapters for two kinds.

:class:`~rmcore.judge.chat.ChatJudge` posts to an OpenAI-compatible endpoint by itself. With ``complete=`` it calls a
function instead and keeps the rest: retries, limits, breaker, deadlines, store.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from rmcore._base.loop import own_thread
from rmcore.judge.tokenizers import tokens_of

__all__ = [
    "CompletionError",
    "CompletionFunction",
    "openai_completions",
    "reply_object",
    "transformers_completions",
]

_STANDARD = frozenset(
    {"model", "temperature", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "response_format"}
    | {"top_p", "seed", "stop", "presence_penalty", "frequency_penalty", "reasoning_effort", "user"}
)


class CompletionFunction(Protocol):
    """``async (messages, **parameters) → completion``: what can stand in for an endpoint.

    If it has an attribute ``special_tokens``, a judge breaks these in the texts it shows; one that is called ``name``
    stands for it in a store, and ``api_key`` is kept out of logs and stores. ``context_tokens`` is how many tokens its
    model takes, and ``tokenizer`` counts them, so that longer texts are cut.
    """

    def __call__(self, messages: list[dict[str, str]], /, **parameters: Any) -> Any:
        """Answer ``messages``; awaited.

        Args:
            messages: ``{"role", "content"}`` each.
            parameters: ``model``, and what the judge was given to send: ``temperature``, ``max_tokens``,
                ``response_format``, ``logprobs``, fields of ``extra_body``. Refuse what is not supported with
                ``CompletionError(400, "response_format is not supported")``: the judge asks again without it.

        Returns:
            A chat completion: a mapping with ``choices`` (and ``usage``), an object with ``model_dump()`` that gives
            one (as of ``openai``), or the bare text of the answer, if it was *finished*: text that was cut off needs a
            mapping with ``finish_reason`` "length".

        Raises:
            CompletionError: the call failed as an HTTP call with that status would have.
            TimeoutError, OSError: no reply in time, no connection; it is tried again.
        """
        ...


class CompletionError(Exception):
    """A completion that failed, in the terms of HTTP: 429 and from 500 on are tried again, others are not.

    Args:
        status: the HTTP status that says it.
        message: for the log, one line; it must not hold secrets.
        retry_after_s: seconds to wait before the next try.
        code: an error code, such as ``insufficient_quota``.
    """

    def __init__(self, status: int, message: str = "", *, retry_after_s: float | None = None, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = {} if retry_after_s is None else {"retry-after": str(retry_after_s)}


def reply_object(reply: object) -> object:
    """What a completion function returned, as a JSON value of the form of a chat completion.

    Raises:
        TypeError: it is none of what :class:`CompletionFunction` may return.
    """
    if isinstance(reply, str):
        return {"choices": [{"message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}]}
    if isinstance(reply, Mapping):
        return dict(reply)
    dump = getattr(reply, "model_dump", None)
    if callable(dump):
        return dump(mode="json")
    raise TypeError(f"complete: got {type(reply).__name__}, expected a text, a mapping, or an object with model_dump()")


class _OpenAI:
    """See :func:`openai_completions`."""

    def __init__(self, client: Any) -> None:
        # One layer of retries is enough, and the judge's knows the deadline.
        self._client = client.with_options(max_retries=0) if callable(getattr(client, "with_options", None)) else client
        self._asynchronous = inspect.iscoroutinefunction(inspect.unwrap(self._client.chat.completions.create))
        self.name = str(getattr(client, "base_url", "")).rstrip("/")

    def __repr__(self) -> str:
        return f"openai_completions({self.name!r})"

    @property
    def api_key(self) -> str:
        """The client's key, to be kept out of logs."""
        key = getattr(self._client, "api_key", "")
        return key if isinstance(key, str) else ""

    async def __call__(self, messages: list[dict[str, str]], /, **parameters: Any) -> Any:
        create = self._client.chat.completions.create
        given = {name: value for name, value in parameters.items() if name in _STANDARD}
        extra = {name: value for name, value in parameters.items() if name not in _STANDARD}
        if extra:
            given["extra_body"] = extra  # a client library takes fields it does not know under this name only
        if self._asynchronous:
            return await create(messages=messages, **given)
        # A server that hangs must not take the threads that everybody shares.
        found = await own_thread(partial(create, messages=messages, **given), "rmcore-completion", daemon=True)
        return await found if inspect.isawaitable(found) else found


def openai_completions(client: Any) -> CompletionFunction:
    """``openai.AsyncOpenAI`` (or ``AsyncAzureOpenAI``, or what has the same ``chat.completions.create``) as a judge's
    ``complete``. The client's own retries are switched off where it has ``with_options``; a synchronous client is
    called in threads. Closing the judge does not close the client.

    Raises:
        TypeError: ``client`` has no ``chat.completions.create``.
    """
    create = getattr(getattr(getattr(client, "chat", None), "completions", None), "create", None)
    if not callable(create):
        raise TypeError(f"client: got {type(client).__name__}, expected an object with chat.completions.create")
    return _OpenAI(client)


class _Transformers:
    """See :func:`transformers_completions`."""

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int) -> None:
        self._model, self._tokenizer, self._max_new_tokens = model, tokenizer, max_new_tokens
        self.tokenizer = tokenizer
        self._lock = threading.Lock()  # generation is not meant to run twice at once on one model
        self.name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)

    def __repr__(self) -> str:
        return f"transformers_completions({self.name!r})"

    @property
    def context_tokens(self) -> int | None:
        """Positions that the model has, or as many tokens as the tokenizer was made for, if these are fewer."""
        config = getattr(self._model, "config", None)
        known = (getattr(config, "max_position_embeddings", None), getattr(self._tokenizer, "model_max_length", None))
        # Tokenizers without a limit say 1e30.
        return min((n for n in known if isinstance(n, int) and 0 < n < 1 << 40), default=None)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The tokenizer's own."""
        return tokens_of(self._tokenizer)

    async def __call__(self, messages: list[dict[str, str]], /, **parameters: Any) -> Any:
        parameters.pop("model", None)
        limit = parameters.pop("max_tokens", None) or parameters.pop("max_completion_tokens", None)
        temperature = float(parameters.pop("temperature", 0.0) or 0.0)
        top = int(parameters.pop("top_logprobs", 0)) if parameters.pop("logprobs", False) else 0
        if parameters:
            raise CompletionError(400, f"{min(parameters)} is not supported by a model in this process")
        gone = threading.Event()
        work = partial(self._generate, messages, limit or self._max_new_tokens, temperature, top, gone)
        try:
            return await own_thread(work, "rmcore-generation")
        except asyncio.CancelledError:
            gone.set()
            raise

    def _generate(
        self,
        messages: Sequence[Mapping[str, str]],
        limit: int,
        temperature: float,
        top: int,
        gone: threading.Event,
    ) -> Any:
        import torch

        tokenizer = self._tokenizer
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # The template has written the special tokens already.
        given = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(self._model.device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        with self._lock, torch.inference_mode():
            if gone.is_set():  # while it waited its turn
                return None
            out = self._model.generate(
                **given, **sampling, max_new_tokens=limit, return_dict_in_generate=True, output_logits=bool(top)
            )
        asked = given["input_ids"].shape[1]
        tokens = out.sequences[0, asked:].tolist()
        ends = self._model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, (list, tuple)) else {ends, tokenizer.eos_token_id}
        finished = bool(tokens) and tokens[-1] in ends
        said = tokens[:-1] if finished else tokens
        choice: dict[str, Any] = {
            "message": {"role": "assistant", "content": tokenizer.decode(said, skip_special_tokens=True)},
            "finish_reason": "stop" if finished else "length",
        }
        if top:
            pairs = zip(said, out.logits, strict=False)
            choice["logprobs"] = {"content": [self._logprobs(token, logits[0], top) for token, logits in pairs]}
        return {"choices": [choice], "usage": {"prompt_tokens": asked, "completion_tokens": len(tokens)}}

    def _logprobs(self, token: int, logits: Any, top: int) -> dict[str, Any]:
        """One entry of ``logprobs.content``, of the model's own distribution (before any temperature)."""
        import torch

        logprobs = torch.log_softmax(logits.float(), dim=-1)
        best = logprobs.topk(min(top, logprobs.shape[-1]))
        entries = [self._entry(token, logprobs[token].item())]
        entries += [self._entry(k, value) for k, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        return {**entries[0], "top_logprobs": entries[1:]}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._tokenizer.decode([token]), "logprob": logprob if math.isfinite(logprob) else -1e5}


def transformers_completions(model: Any, tokenizer: Any, *, max_new_tokens: int = 512) -> CompletionFunction:
    """A causal language model of transformers, in this process, as a judge's ``complete``.

    One question is answered at a time, in a thread, with the tokenizer's chat template; ``temperature`` 0 (the default)
    is greedy. Log-probabilities are given, so ``soft=True`` works; ``response_format`` is refused. Give the judge
    ``ClientOptions(concurrency=1, timeout_s=...)`` with the time that one answer may take.

    Args:
        model: with ``generate``, on the device where it is to run.
        tokenizer: its tokenizer, with a chat template.
        max_new_tokens: longest answer, unless the judge is given ``max_tokens``.

    Raises:
        TypeError: ``model`` cannot generate or ``tokenizer`` has no chat template.
        ValueError: ``max_new_tokens`` is not positive.
    """
    if not callable(getattr(model, "generate", None)):
        raise TypeError(f"model: got {type(model).__name__}, expected a model with generate()")
    if not getattr(tokenizer, "chat_template", None):
        raise TypeError(f"tokenizer: got {type(tokenizer).__name__} without chat_template, expected one with it")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
    return _Transformers(model, tokenizer, max_new_tokens)
