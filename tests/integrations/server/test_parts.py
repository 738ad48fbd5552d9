"""The server's smaller parts by themselves: kept answers, OpenRLHF's texts."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore.integrations.server import ServeSettings
from rmcore.integrations.server.assembly import ConflictError
from rmcore.integrations.server.remote_rm import grouped, prompt_text, response_text
from rmcore.integrations.server.replies import ReplyStore
from rmcore.integrations.server.settings import END_TOKENS, is_loopback


class Work:
    def __init__(self, answer=b"answer"):
        self.answer, self.calls, self.gate = answer, 0, asyncio.Event()
        self.gate.set()

    async def __call__(self):
        self.calls += 1
        await self.gate.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def go(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


# -- kept answers ----------------------------------------------------------------------------------------------------


def test_an_answer_is_made_once_and_kept_for_a_time(manual_clock):
    async def main():
        store, work = ReplyStore(10.0, 1000, manual_clock), Work()
        work.gate.clear()
        both = [asyncio.create_task(store.once("k", b"d", work)) for _ in range(2)]
        await manual_clock.advance(0)
        with pytest.raises(ConflictError):
            await store.once("k", b"other", work)
        both[0].cancel()
        work.gate.set()
        assert await both[1] == (b"answer", True)
        await manual_clock.advance(9)
        assert await store.once("k", b"d", work) == (b"answer", True)
        with pytest.raises(ConflictError):
            await store.once("k", b"other", work)
        assert (work.calls, store.replayed) == (1, 2)
        await manual_clock.advance(2)
        assert await store.once("k", b"other", work) == (b"answer", False)
        assert work.calls == 2

    go(main())


def test_the_oldest_answers_make_room(manual_clock):
    async def main():
        store, work = ReplyStore(10.0, 100, manual_clock), Work(b"x" * 40)
        for key in "abc":
            await store.once(key, b"", work)
        await manual_clock.advance(0)
        assert [(await store.once(key, b"", work))[1] for key in "cba"] == [True, True, False]
        big = Work(b"x" * 101)
        assert not (await store.once("big", b"", big))[1]
        await manual_clock.advance(0)
        assert not (await store.once("big", b"", big))[1]

    go(main())


def test_a_failure_is_told_and_not_kept(manual_clock):
    async def main():
        store, work = ReplyStore(10.0, 100, manual_clock), Work(ZeroDivisionError())
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await store.once("k", b"", work)
            await manual_clock.advance(0)
        assert work.calls == 2

    go(main())


# -- OpenRLHF --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "prompt", "expected"),
    [
        ("askanswer", "ask", "answer"),
        ("ask", "ask", ""),
        ("<s>askanswer</s>", "ask", "answer"),
        ("<s>askanswer</s>", "<s>ask", "answer"),
        ("<pad><pad><s>askanswer<|im_end|><pad>", "ask", "answer"),
        ("ask</s>", "ask", ""),
        ("ask the</s> end ", "ask", " the</s> end "),  # only at the very end
        ("aska\n<|im_end|>", "ask", "a\n"),
        ("askask", "ask", "ask"),
        ("answer", "", "answer"),
    ],
)
def test_the_response_is_what_follows_the_prompt(query, prompt, expected):
    assert response_text(query, prompt, END_TOKENS) == expected


@pytest.mark.parametrize(
    ("query", "prompt"),
    [
        ("<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>yes<｜end▁of▁sentence｜>", "<｜User｜>hi<｜Assistant｜>"),
        ("<s> [INST] hi [/INST] yes</s>", "<s>[INST] hi [/INST] "),
        ("<s><s> [INST] hi [/INST] yes</s>", "<s>[INST] hi [/INST] "),
        ("<s>[INST] hi[/INST]yes</s>", "<s> [INST] hi[/INST]"),
        ("<BOS_TOKEN><|START_OF_TURN_TOKEN|>hi<|CHATBOT|>yes<eos>", "<|START_OF_TURN_TOKEN|>hi<|CHATBOT|>"),
        ("[gMASK]<sop><|user|>hi<|assistant|>yes<|endoftext|>", "<|user|>hi<|assistant|>"),
        ("<pad><pad><bos><start_of_turn>user\nhi<end_of_turn>yes<eos>", "<start_of_turn>user\nhi<end_of_turn>"),
    ],
)
def test_tokenizers_that_add_a_bos_or_a_space_are_understood(query, prompt):
    assert response_text(query, prompt, END_TOKENS) == "yes"


BOS = [
    "<s>",
    "<bos>",
    "<|begin_of_text|>",
    "<｜begin▁of▁sentence｜>",
    "[BOS]",
    "<BOS_TOKEN>",
    "[gMASK]<sop>",
    "<seed:bos>",
]
BOS += [
    "]~!b[",
    "]!p~[",
    "[@BOS@]",
    "<begin_of_document>",
    "<eod>",
    "<unused0>",
    "<extra_id_0>",
    "[|system|]",
    "<unk>",
    "[CLS]",
]


@given(
    st.lists(st.sampled_from([*BOS, *END_TOKENS]), max_size=3),
    st.booleans(),
    st.sampled_from(["hi", " hi", "hi ", "<bos>hi", "[INST] hi [/INST]", "<b>hi", "]hi[", "\n", "日本"]),
    st.sampled_from(["yes", "", " ", " yes", "\n", "<b>"]),
    st.lists(st.sampled_from(END_TOKENS), max_size=2),
)
def test_what_tokenizers_put_around_is_taken_off(ahead, space, prompt, response, behind):
    """A BOS, padding, and one space of the decoder's in front; ends and padding behind; no more than that."""
    lead = "".join(ahead) + " " * (space and bool(ahead))
    assert response_text(lead + prompt + response + "".join(behind), prompt, END_TOKENS) == response


@given(st.text("ab <|>s[]/", max_size=12), st.text("ab <|>", min_size=1, max_size=12))
def test_a_query_made_of_its_prompt_and_a_response_gives_the_response(prompt, response):
    if response.endswith(END_TOKENS):
        return
    assert response_text(prompt + response, prompt, END_TOKENS) == response
    assert response_text("<s>" + prompt + response, "<s>" + prompt, END_TOKENS) == response


def test_a_refused_query_shows_where_it_parts_from_its_prompt():
    with pytest.raises(InputError, match=r"'X rest' where the prompt goes on with 'c d e', at character 4"):
        response_text("a b X rest", "a b c d e", END_TOKENS)


@pytest.mark.parametrize(("query", "prompt"), [("sk answer", "ask"), ("", "ask"), ("<s>", "ask"), ("Ask", "ask")])
def test_a_query_that_does_not_begin_with_its_prompt_is_refused(query, prompt):
    with pytest.raises(InputError, match=r"query: got .*, expected the prompt"):
        response_text(query, prompt, END_TOKENS)


def test_a_chat_template_is_taken_off_where_it_is():
    settings = ServeSettings(prompt_prefix="<u>", prompt_suffix="<a>")
    assert prompt_text("<u>what<a>", settings) == "what"
    assert prompt_text("plain", ServeSettings()) == "plain"
    for text in ("what<a>", "<u>what", "<u", "what"):
        with pytest.raises(InputError, match="expected a text between"):
            prompt_text(text, settings)


def test_queries_are_grouped_by_prompt_in_order():
    assert grouped(list("ababab"), 3) == [[0, 2, 4], [1, 3, 5]]
    assert grouped(list("aabaab"), 2) == [[0, 1], [3, 4], [2, 5]]
    assert grouped(list("abba"), None) == [[0, 3], [1, 2]]
    with pytest.raises(InputError, match="3 times, expected a multiple of --group-size 2"):
        grouped(list("ababa"), 2)
    with pytest.raises(InputError, match="once, expected twice or more"):
        grouped(list("aab"), None)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True), ("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("[::1]", True),
        ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("localhost.example.org", False), ("", False),
    ],
)  # fmt: skip
def test_loopback(host, loopback):
    assert is_loopback(host) is loopback
