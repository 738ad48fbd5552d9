"""The completion call as an argument: functions, openai-like clients and a model in this process as judges."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from types import SimpleNamespace

import httpx
import pytest

from rmcore._base.errors import JudgeError
from rmcore.judge import (
    ChatJudge,
    ClientOptions,
    CompletionError,
    JudgePrompt,
    Pair,
    RetryPolicy,
    openai_completions,
    transformers_completions,
)

PAIRS = [Pair("p", "good", "bad"), Pair("p", "bad", "good")]
QUICK = RetryPolicy(max_attempts=3, base_s=0.001)


def verdict_text(messages) -> str:
    """What a judge that prefers "good" answers."""
    question = JudgePrompt.parse(messages)
    labels = question.labels
    return f"Because.\n<verdict>{labels.win if question.first == 'good' else labels.loss}</verdict>"


def judged(complete, *, pairs=PAIRS, options=None, **given):
    """The verdicts of a judge that asks through ``complete``."""
    judge = ChatJudge(model="m", complete=complete, client=options or ClientOptions(retry=QUICK), **given)
    return asyncio.run(judge.judge(pairs)), judge


def test_a_function_that_returns_text_is_a_judge():
    asked = []

    async def complete(messages, **parameters):
        asked.append(parameters)
        return verdict_text(messages)

    verdicts, judge = judged(complete, temperature=0.0, extra_body={"seed": 1})
    assert [v.preference for v in verdicts] == [1.0, -1.0]
    assert asked == [{"model": "m", "temperature": 0.0, "seed": 1}] * 4
    assert judge.client.state.attempts == judge.client.state.calls == 4


def test_counts_and_finish_reasons_of_a_mapping_are_read():
    async def complete(messages, **parameters):
        message = {"content": verdict_text(messages)}
        return {
            "choices": [{"message": message, "finish_reason": "length"}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3},
        }

    (verdict,), _ = judged(complete, pairs=PAIRS[:1], orders="one")
    assert (verdict.preference, verdict.reason) == (None, "length")
    assert (verdict.usage.prompt_tokens, verdict.usage.completion_tokens) == (7, 3)


@pytest.mark.parametrize(
    ("error", "reason", "attempts"),
    [
        (CompletionError(429, "slow down", retry_after_s=0.001), "http_429", 3),
        (CompletionError(429, "no money", code="insufficient_quota"), "insufficient_quota", 1),
        (CompletionError(400, "no"), "http_400", 1),
        (TimeoutError(), "timeout", 3),
        (ConnectionResetError(), "connection", 3),
        (ValueError("sk-secretsecret"), "error_ValueError", 1),
    ],
)
def test_what_a_function_raises_is_a_reason(error, reason, attempts, caplog):
    async def complete(messages, **parameters):
        raise error

    (verdict,), _ = judged(complete, pairs=PAIRS[:1], orders="one")
    assert (verdict.preference, verdict.reason, verdict.usage.attempts) == (None, reason, attempts)
    assert "secretsecret" not in caplog.text


def test_a_call_that_fails_at_first_is_tried_again():
    calls = []

    async def complete(messages, **parameters):
        calls.append(1)
        if len(calls) < 3:
            raise CompletionError(503, "loading")
        return verdict_text(messages)

    (verdict,), _ = judged(complete, pairs=PAIRS[:1], orders="one")
    assert (verdict.preference, verdict.usage.attempts) == (1.0, 3)


def test_a_call_that_hangs_is_cut_at_its_timeout():
    async def complete(messages, **parameters):
        await asyncio.sleep(60)

    options = ClientOptions(retry=RetryPolicy(max_attempts=1), timeout_s=0.05)
    (verdict,), _ = judged(complete, pairs=PAIRS[:1], orders="one", options=options)
    assert verdict.reason == "timeout"


def test_what_is_no_completion_is_an_error_of_the_pair():
    async def complete(messages, **parameters):
        return 7

    verdicts, _ = judged(complete)
    assert {v.reason for v in verdicts} == {"error_TypeError"}


def test_a_store_needs_a_name_for_the_judge(tmp_path):
    asked = []

    async def complete(messages, **parameters):
        asked.append(1)
        return verdict_text(messages)

    with pytest.raises(JudgeError, match="judge_id"):
        judged(complete, store=tmp_path / "v.db")
    for _ in range(2):
        verdicts, judge = judged(complete, store=tmp_path / "v.db", judge_id="mine")
        judge.close()
        assert [v.preference for v in verdicts] == [1.0, -1.0]
    assert len(asked) == 2, "(a, b) and (b, a) share both questions, and the second run finds them stored"


def test_one_of_an_address_and_a_function():
    with pytest.raises(JudgeError, match="neither"):
        ChatJudge(model="m")
    with pytest.raises(JudgeError, match="both"):
        ChatJudge("http://localhost/v1", "m", complete=openai_completions(FakeOpenAI()))
    with pytest.raises(JudgeError, match="complete: got FakeOpenAI"):
        ChatJudge(model="m", complete=FakeOpenAI())


# -- openai ----------------------------------------------------------------------------------------------------------


class FakeCompletion:
    """As openai's: a pydantic object."""

    def __init__(self, text):
        self.text = text

    def model_dump(self, *, mode):
        assert mode == "json"
        return {"choices": [{"message": {"role": "assistant", "content": self.text}, "finish_reason": "stop"}]}


class StatusError(Exception):
    """As openai.APIStatusError."""

    def __init__(self, message, status_code, code=None, headers=None):
        super().__init__(message)
        self.status_code, self.code, self.type = status_code, code, None
        self.response = SimpleNamespace(headers=httpx.Headers(headers or {}))


class FakeOpenAI:
    """As openai.AsyncOpenAI, as far as it is used."""

    def __init__(self, errors=(), asynchronous=True):
        self.base_url, self.api_key = httpx.URL("https://api.example/v1/"), "sk-very-secret-key"
        self.errors, self.given, self.options = list(errors), [], {}
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.acreate if asynchronous else self.create))

    def with_options(self, **options):
        self.options = options
        return self

    def create(self, *, messages, model, temperature=None, extra_body=None):
        self.given.append({"model": model, "temperature": temperature, "extra_body": extra_body})
        if self.errors:
            raise self.errors.pop(0)
        return FakeCompletion(verdict_text(messages))

    async def acreate(self, **given):
        return self.create(**given)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_openai_client_is_a_judge(asynchronous):
    client = FakeOpenAI(asynchronous=asynchronous)
    verdicts, judge = judged(openai_completions(client), temperature=0.0, extra_body={"top_k": 5})
    assert [v.preference for v in verdicts] == [1.0, -1.0]
    assert client.given[0] == {"model": "m", "temperature": 0.0, "extra_body": {"top_k": 5}}
    assert client.options == {"max_retries": 0}, "retries are the judge's"
    assert judge.judge_id == "https://api.example/v1"
    assert "secret" not in repr(judge)


def test_errors_of_an_openai_client_are_http_statuses(caplog):
    timeout = RuntimeError("Request timed out.")
    timeout.__cause__ = httpx.ReadTimeout("slow")
    broken = RuntimeError("Connection error.")
    broken.__cause__ = httpx.ConnectError("refused")
    errors = [StatusError("x", 429, headers={"retry-after-ms": "1"}), timeout, broken]
    (verdict,), _ = judged(
        openai_completions(FakeOpenAI(errors)),
        pairs=PAIRS[:1],
        orders="one",
        options=ClientOptions(retry=RetryPolicy(max_attempts=4, base_s=0.001)),
    )
    assert (verdict.preference, verdict.usage.attempts) == (1.0, 4)
    with caplog.at_level(logging.WARNING):
        refused = StatusError("no such key sk-very-secret-key", 401, code="invalid_api_key")
        (verdict,), _ = judged(openai_completions(FakeOpenAI([refused])), pairs=PAIRS[:1], orders="one")
    assert verdict.reason == "http_401"
    assert "no such key ***" in caplog.text


def test_what_is_no_client_is_refused():
    with pytest.raises(TypeError, match=r"chat\.completions\.create"):
        openai_completions(object())


# -- transformers ----------------------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def tiny():
    """A tiny random causal language model with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: k for k, token in enumerate([*alphabet, "</s>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=TEMPLATE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8192,
        eos_token_id=vocabulary["</s>"],
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


class Scripted:
    """The tiny model's ``generate``, with a text put in the place of its own."""

    def __init__(self, model, tokenizer, text):
        self.model, self.tokenizer, self.text, self.prompts = model, tokenizer, text, []
        self.config, self.generation_config, self.device = model.config, model.generation_config, model.device

    def generate(self, input_ids, max_new_tokens, output_logits, **given):
        import torch

        prompt = self.tokenizer.decode(input_ids[0])
        self.prompts.append(prompt)
        text = self.text(JudgePrompt.parse([{"content": prompt}]))
        said = [*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id][:max_new_tokens]
        logits = tuple(20.0 * torch.nn.functional.one_hot(torch.tensor([token]), 257).float() for token in said)
        return SimpleNamespace(
            sequences=torch.cat([input_ids, torch.tensor([said])], 1), logits=logits if output_logits else None
        )


def test_a_model_in_this_process_is_a_judge(tiny):
    model, tokenizer = tiny
    scripted = Scripted(
        model, tokenizer, lambda q: f"So <verdict>{q.labels.win if q.first == 'good' else q.labels.loss}</verdict>"
    )
    options = ClientOptions(concurrency=1)
    verdicts, judge = judged(
        transformers_completions(scripted, tokenizer), options=options, soft=True, output="json_schema"
    )
    assert [v.reason for v in verdicts] == ["", ""]
    assert [v.preference for v in verdicts] == pytest.approx([1.0, -1.0], abs=1e-6)
    assert scripted.prompts[0].startswith("<system>You are an impartial judge.")
    assert scripted.prompts[0].endswith("<assistant>")
    assert "response_format" in judge.dropped, "it was refused by name, and asked for text instead"
    assert verdicts[0].usage.prompt_tokens > 0


def test_a_model_that_does_not_finish_gives_no_verdict(tiny):
    model, tokenizer = tiny
    scripted = Scripted(model, tokenizer, lambda q: f"<verdict>{q.labels.win}</verdict> and so on")
    (verdict,), _ = judged(transformers_completions(scripted, tokenizer), pairs=PAIRS[:1], orders="one", max_tokens=24)
    assert (verdict.preference, verdict.reason) == (None, "length")


def test_the_model_itself_is_asked(tiny):
    """Random weights have nothing to say; but they say it within the limit, and with log-probabilities."""
    complete = transformers_completions(*tiny, max_new_tokens=4)
    messages = [{"role": "user", "content": "hello"}]
    reply = asyncio.run(complete(messages, model="m", logprobs=True, top_logprobs=3))
    (choice,) = reply["choices"]
    assert reply["usage"]["completion_tokens"] <= 4
    for entry in choice["logprobs"]["content"]:
        assert len(entry["top_logprobs"]) == 3
        # Greedy: what was said is the likeliest.
        assert entry["logprob"] == max(one["logprob"] for one in entry["top_logprobs"]) <= 0
    again = asyncio.run(complete(messages, model="m", logprobs=True, top_logprobs=3))
    assert again == reply
    sampled = {asyncio.run(complete(messages, temperature=5.0))["choices"][0]["message"]["content"] for _ in range(4)}
    assert len(sampled) > 1
    with pytest.raises(CompletionError, match="seed is not supported"):
        asyncio.run(complete(messages, seed=random.Random(0).random()))


def test_what_cannot_generate_is_refused(tiny):
    model, tokenizer = tiny
    with pytest.raises(TypeError, match="generate"):
        transformers_completions(object(), tokenizer)
    with pytest.raises(TypeError, match="chat_template"):
        transformers_completions(model, SimpleNamespace(chat_template=None))
    with pytest.raises(ValueError, match="max_new_tokens"):
        transformers_completions(model, tokenizer, max_new_tokens=0)


def test_a_model_in_this_process_knows_its_special_tokens(tiny):
    model, tokenizer = tiny
    known = transformers_completions(model, tokenizer).special_tokens
    assert set(tokenizer.all_special_tokens) <= set(known)
    assert known == tuple(sorted(known))


def test_a_synchronous_client_that_hangs_takes_no_thread_from_anybody():
    release = threading.Event()

    def create(**given):
        release.wait(20)
        return FakeCompletion({})

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    options = ClientOptions(concurrency=64, first_concurrency=64, timeout_s=0.05, retry=RetryPolicy(max_attempts=1))
    judge = ChatJudge(model="m", complete=openai_completions(client), judge_id="j", client=options, orders="one")

    async def main():
        verdicts = await judge.judge([Pair("p", f"a{k}", "b") for k in range(64)])
        assert {verdict.reason for verdict in verdicts} == {"timeout"}
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 1), 5) == 1

    try:
        asyncio.run(main())
    finally:
        release.set()


def test_what_nobody_waits_for_is_not_generated():
    started, release, generated = threading.Event(), threading.Event(), []

    class Slow:
        device = "cpu"

        def generate(self, **given):
            generated.append(1)
            started.set()
            release.wait(10)
            raise ValueError("enough")

    class Tokens:
        chat_template = "x"

        def apply_chat_template(self, messages, **how):
            return "x"

        def __call__(self, text, **how):
            class Given(dict):
                def to(self, device):
                    return self

            return Given(input_ids=None)

    complete = transformers_completions(Slow(), Tokens())

    async def main():
        calls = [asyncio.create_task(complete([])) for _ in range(20)]
        while not started.is_set():
            await asyncio.sleep(0.001)
        for call in calls[1:]:
            call.cancel()
        await asyncio.wait(calls[1:])
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 1), 5) == 1
        release.set()
        with pytest.raises(ValueError, match="enough"):
            await calls[0]

    asyncio.run(main())
    assert generated == [1]
