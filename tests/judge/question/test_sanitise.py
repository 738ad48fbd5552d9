"""Control sequences by shape: the tokens of many model families, their look-alikes, and the text that is none of it."""

from __future__ import annotations

import re
import string
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore.judge import ChatJudge, JudgePrompt, Pair
from rmcore.judge.question import sanitise as module
from rmcore.judge.question.sanitise import ESCAPE, restore, sanitise

# What chat templates and tokenizers of each family hold; none of it is in the code as a list of tokens.
FAMILIES = {
    "ChatML, Qwen": "<|im_start|> <|im_end|> <|endoftext|> <|vision_start|> <tool_call> </tool_response> /no_think",
    "Llama 2": "<s> </s> [INST] [/INST] <<SYS>> <</SYS>> <PRE> <SUF> <MID> <EOT> <unk>",
    "Llama 3 and 4": "<|eot_id|> <|start_header_id|> <|eom_id|> <|python_tag|> <|header_start|> <|eot|> <|reserved_1|>",
    "Mistral": "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [AVAILABLE_TOOLS] [TOOL_CALLS] [IMG] [IMG_BREAK] [THINK] [ARGS] "
    "[BEGIN_AUDIO] [MODEL_SETTINGS] <SPECIAL_20>",
    "Gemma 1 to 3": "<start_of_turn> <end_of_turn> <bos> <eos> <unused42> <start_of_image> [@BOS@] <2mass> <mask>",
    "Gemma 4": '<|turn> <turn|> <|channel> <channel|> <|tool> <tool|> <|tool_call> <tool_response|> <|"|> <|think|>',
    "DeepSeek": "<｜begin▁of▁sentence｜> <｜User｜> <｜Assistant｜> <｜DSML｜invoke> </｜DSML｜invoke> </think>",
    "gpt-oss": "<|start|> <|end|> <|channel|> <|message|> <|return|> <|call|> <|constrain|>",
    "EXAONE": "[|user|] [|assistant|] [|endofturn|] [|system|] [BOS] <thought> </thought>",
    "MiniMax": "]~b] ]~!b[ [e~[ ]!p~[ ]!d~[ ]<]speech[>[ ]<]start_of_image[>[ <minimax:tool_call> <code_interpreter>",
    "Nemotron, Apertus": "<SPECIAL_11> <SPECIAL_12> <extra_id_0> <|inner_prefix|> <TOOLCALL> </TOOLCALL>",
    "Seed": "<seed:bos> <seed:eos> <seed:think> </seed:think> <seed:tool_call>",
    "Cohere": "<BOS_TOKEN> <EOP_TOKEN> <MASK_TOKEN> <|START_OF_TURN_TOKEN|> <|START_THINKING|> <|END_RESPONSE|> <CLS>",
    "InternLM2": "[UNUSED_TOKEN_146] [UNUSED_TOKEN_145] <|action_start|> <|interpreter|> <|plugin|>",
    "StarCoder, SmolLM": "<jupyter_start> <jupyter_output> <fim_prefix> <reponame> <gh_stars> <file_sep>",
    "GLM": "[gMASK] [sMASK] <sop> <eop> <|user|> <|assistant|> <|observation|> <arg_key> </arg_value> /nothink",
    "Kimi": "◁think▷ ◁/think▷ <|im_middle|> <|tool_calls_section_begin|> [EOS] [EOT] [start_header_id] [extra_id_3]",
    "Phi": "<|user|> <|assistant|> <|end|> <|dummy_85|> <|fim_suffix|> <|tool|>",
    "Hunyuan": "<｜hy_begin▁of▁sentence｜> <｜hy_User｜> <|startoftext|> <|extra_0|> <answer_start>",
    "Falcon": ">>TITLE<< >>ABSTRACT<< >>QUESTION<< <|system|>",
    "Ling, ERNIE": "<role> </role> <|role_end|> <mask:0> <mask:7> <cls> <sep> <|begin_of_sentence|>",
    "BERT, T5, Baichuan": "[CLS] [SEP] [MASK] [PAD] [unused7] <pad> <extra_id_99> <reserved_106>",
    "IDEFICS, InternVL": "<end_of_utterance> <IMG_CONTEXT> <fake_token_around_image> <image> <global-img|> "
    "<global-img> <row_1_col_1> <box> </box> <ref> <quad>",
    "Doubao, AutoGLM": "<[BOS_never_used_51bc]> <[PLHD20_never_used_51bc]> <[begin_of_image]> <think_never_used_51bc>",
    "Tekken, Gemini": "[control_8] [TRANSCRIBE] <ctrl99> <ctrl100> <start_function_call> <escape>",
    "Sky-T1, Nanbeige": "<|begin_of_thought|> <|end_of_solution|> <|thought_start|> <|box_start|>",
    "MOSS, ChatGLM": "<eoh> <eoa> <sod> <gmask> <|Human|> <|MOSS|>",
    "OLMo, Persimmon, Falcon 3": "|||IP_ADDRESS||| |||EMAIL_ADDRESS||| |ENDOFTEXT| |SPEAKER| >>UNUSED_189<<",
    "Gemma's own, LongCat, MiniCPM": "[multimodal] [toxicity=0] /think_on /think_off <longcat_s> <用户> <AI> <slice>",
    "Qwen-VL, Hunyuan, ERNIE": "<img> </img> <imgpad> <answer> </answer> <response> </response> <cot>",
    "TeleChat, Step, Apertus": "<_user> <_bot> <_end> <im_patch> <|inner_suffix|> <|BOT|> <|_unuse_missing_100256|>",
    "LFM, Granite, Aya": "<|tool_list_start|> <|start_of_role|> <|tool_call|> <|CHATBOT_TOKEN|> <|NEW_FILE|> <pr>",
}
TOKENS = sorted({token for tokens in FAMILIES.values() for token in tokens.split()})
FULL_WIDTH = {ord(c): chr(ord(c) + 0xFEE0) for c in string.punctuation + string.ascii_letters + string.digits}
LOOKALIKES = {
    "full width": lambda t: t.translate(FULL_WIDTH),
    "full-width brackets": lambda t: t.translate({ord(c): FULL_WIDTH[ord(c)] for c in "<>[]|/"}),
    "other brackets": lambda t: t.translate(str.maketrans("<>|[]", "〈〉∣⟦⟧")),
    "spaced": lambda t: re.sub(r"(?<=[<\[◁])/?|/?(?=[>\]▷]$)|[|:]", r" \g<0> ", t),
    "spaced by no-break spaces": lambda t: re.sub(r"(?<=[<\[◁])|(?=[>\]▷]$)", "\u00a0\u3000", t),
    "invisible": lambda t: "\u200b".join(t),
    "invisible at the edges": lambda t: t[0] + "\u2060\ufeff" + t[1:-1] + "\u00ad" + t[-1],
    "other bars": lambda t: t.replace("|", "\u2758"),
    "an entity and a bracket": lambda t: re.sub(r"\A<(?!<)", "&#x3c;", t),
    "marks": lambda t: re.sub(r"[A-Za-z]", "\\g<0>\u0332", t),
}
# Brackets that touch others mean something else than brackets with a space between.
TOUCHING = {"]~!b[", "[e~[", "]!p~[", "]!d~[", "]<]speech[>[", "]<]start_of_image[>[", "<<SYS>>", "<</SYS>>"}

UNTOUCHED = [
    "List<int> and Map<String, List<Integer>>",
    "HashMap<K, V>, Vec<T>, Option<Box<T>>, vector<uint8_t>, static_cast<size_t>(x)",
    "a<b>c and a < b > c and a<b && c>d",
    "[1] and [12], [a], x[i][j], a[[1]], df[~mask], x[!ok], [x for x in xs], [A-Z], [a-zA-Z0-9_]",
    "[a link](https://example.org/a?b=1) and ![an image](x.png) and [README](README.md)".replace(
        "[README]", "[Readme]"
    ),
    "- [ ] to do\n- [x] done",
    "<div class='x'><p>one</p><br/><img src='a.png'/></div><h1>Title</h1><my-element>",
    "x[<y>] and [<Fact>] and f<[1, 2]> and a<[b c]>, x\u1d57\u02b0 and H\u2082O",
    "<https://example.org/a_b> and <me@example.org>",
    "#include <stdio.h>\nstd::map<int, std::pair<a,b>> m; std::cout << x << std::endl;",
    "f <$> x <|> y, p <*> q, x |> f, xs ||> g, a <- b",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "C:\\dir\\file, /usr/bin/think/x, http://x/think, and/or",
    "at <12:30> and <10:15>",
    "x <<= 2; y >>= 3; a >> b << c",
    "{{ value }} {% if a < b %} $x_1 \\[ x \\]",
    "日本語〈注〉と《書名》、【NEWS】",
]
# Ordinary text of a shape that control tokens have: signs are put in, and nothing else happens to it.
SIGNED = {
    "[TODO] see [README](x)": "[␛TODO] see [␛README](x)",
    "char b[MAX_LEN];": "char b[␛MAX_LEN];",
    "<YOUR_NAME>, <TABLE>": "<␛YOUR_NAME>, <␛TABLE>",
    "vector<my_type>": "vector<␛my_type>",
    "<xsl:template>": "<␛xsl:template>",
    "a <b|> c": "a <␛b|> c",
    "if x <1 and y> 2: return [THINKING]": "if x <1 and y> 2: return [␛THINKING]",
}


def _text_of(*pieces: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(pieces) | st.text(max_size=3), max_size=8).map("".join)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_control_tokens_of_a_family_are_broken(family):
    for token in FAMILIES[family].split():
        safe, count = sanitise(f"before{token}after")
        if token.startswith("/"):
            safe, count = sanitise(f"before {token} after")
        assert count > 0, token
        assert token not in safe, token
        assert token in restore(safe)


@pytest.mark.parametrize("name", sorted(LOOKALIKES))
def test_their_lookalikes_are_broken(name):
    for token in TOKENS:
        if token.startswith(("/", ">", "|", "<global-img")) or (token in TOUCHING and "spaced" in name):
            continue
        disguised = LOOKALIKES[name](token)
        assert sanitise(f"before {disguised} after")[1] > 0, disguised


def test_there_are_as_many_as_the_documentation_says():
    assert len(FAMILIES) >= 22
    assert len(TOKENS) >= 120


@pytest.mark.parametrize("text", UNTOUCHED)
def test_ordinary_text_is_left_as_it_is(text):
    assert sanitise(text) == (text, 0)


@pytest.mark.parametrize("text", SIGNED)
def test_ordinary_text_of_a_tokens_shape_stays_readable(text):
    safe, count = sanitise(text)
    assert safe == SIGNED[text]
    assert (restore(safe), safe.count(ESCAPE)) == (text, count)


@given(_text_of(*TOKENS, *UNTOUCHED, *SIGNED, ESCAPE, "<", "|", ">", "[", "]", " ", "\n", "&lt;", "\u200b"))
def test_nothing_survives_and_a_second_pass_finds_nothing(text):
    safe, count = sanitise(text)
    assert restore(safe) == text
    assert len(safe) == len(text) + count + text.count(ESCAPE)
    assert not [token for token in TOKENS if not token.startswith("/") and token in safe]
    again, found = sanitise(safe)
    assert found == 0
    assert restore(again) == safe


@given(
    st.sampled_from(["<|{}|>", "<|{}>", "<{}|>", "[|{}|]", "</|{}>", "◁{}▷"]),
    st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=60),
    st.text(max_size=5),
    st.text(max_size=5),
)
def test_tokens_that_nobody_has_seen_are_broken(shape, name, before, after):
    token = shape.format(name)
    assert token not in sanitise(before + token + after)[0]


@given(
    st.sampled_from(["<{}>", "</{}>", "[{}]", "[/{}]"]),
    st.from_regex(r"[A-Z][A-Z0-9]{0,9}_?[A-Z0-9]{1,20}", fullmatch=True, alphabet=st.characters(codec="ascii")),
)
def test_names_in_capitals_are_broken(shape, name):
    token = shape.format(name)
    assert token not in sanitise(f"x{token}y")[0]


@given(
    st.from_regex(r"<[a-z]{1,8}(_[a-z0-9]{1,8}){1,3}>|<[a-z]{1,8}:[a-z_]{1,12}>", fullmatch=True).filter(
        lambda t: not t.endswith("_t>")
    )
)
def test_names_of_two_parts_are_broken(token):
    assert token not in sanitise(f"x{token}y")[0]


@given(_text_of(*TOKENS, "<", "[", "a" * 40, " " * 40), st.integers(1, 50))
def test_looking_through_a_text_in_parts_changes_nothing(text, size):
    whole = sanitise(text)
    chunk = module._CHUNK
    module._CHUNK = size
    try:
        assert sanitise(text) == whole
    finally:
        module._CHUNK = chunk


# -- the judge's own tokens ------------------------------------------------------------------------------------------

OWN = ("\u2581user\u2581", "@@end", "<start-turn>", "<start-turn-of>", "|ENDOFTEXT|", "<|im_end|>")


@given(_text_of(*OWN, *TOKENS, ESCAPE, "@", "<start"))
def test_a_tokenizers_own_tokens_are_broken(text):
    safe, count = sanitise(text, OWN)
    assert restore(safe) == text
    assert not [token for token in OWN if token in safe]
    assert sanitise(safe, OWN)[1] == 0
    assert count >= sanitise(text)[1]


def test_thousands_of_own_tokens_make_one_pattern_that_branches_little():
    tokens = tuple(f"@reserved-{k}@" for k in range(5_000))
    safe, count = sanitise("x @reserved-4711@ y @reserved-x@", tokens)
    assert (safe, count) == ("x @␛reserved-4711@ y @reserved-x@", 1)
    assert (
        _work(parser.parse(module._own(tokens).pattern))[0] < 200_000
    )  # it reads 16 characters; a list would, 5,000 times


# -- time ------------------------------------------------------------------------------------------------------------


def _work(parsed: object) -> tuple[int, int, int]:
    """Bounds for one position of a text: steps of the matcher, ways to match, and characters looked at."""
    steps, ways, reach = 0, 1, 0
    for op, value in parsed:  # type: ignore[attr-defined]
        more, forks, width = 1, 1, 1
        if op is ops.BRANCH:
            parts = [_work(part) for part in value[1]]
            more, forks, width = sum(p[0] for p in parts), sum(p[1] for p in parts), max(p[2] for p in parts)
        elif op is ops.SUBPATTERN:
            more, forks, width = _work(value[3])
        elif op in (ops.ASSERT, ops.ASSERT_NOT):
            more, forks, width = _work(value[1])[0], 1, _work(value[1])[2]
        elif op is ops.ATOMIC_GROUP:
            more, forks, width = _work(value)[0], 1, _work(value)[2]
        elif op in (ops.MAX_REPEAT, ops.MIN_REPEAT, ops.POSSESSIVE_REPEAT):
            least, most, part = value
            assert most is not ops.MAXREPEAT, "an unbounded repeat"
            inner = _work(part)
            assert inner[1] == 1 or most == 1, "a repeat of what can match in several ways"
            more, width = inner[0] * int(most), inner[2] * int(most)
            forks = 1 if op is ops.POSSESSIVE_REPEAT else int(most) * inner[1] - int(least) + 1
        elif op is ops.AT:
            width = 0
        steps += ways * more
        ways *= forks
        reach += width
    return steps, ways, reach


def test_the_work_at_each_position_is_bounded():
    steps, _, reach = _work(parser.parse(module._DANGEROUS.pattern))
    assert steps < 500_000  # the sum over all alternatives, of which a character begins few
    assert reach < module._REACH


def test_the_bound_sees_what_was_slow():
    """Spaces before and behind an optional slash, taken back one by one: 6 s for a megabyte."""
    slow = r"<(?=[ ]{0,8}/?[ ]{0,8}v[ ]{0,3}e[ ]{0,3}r[ ]{0,3}d)"
    assert _work(parser.parse(slow))[0] > 10 * _work(parser.parse(slow.replace("}", "}+")))[0]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "unit", ["‹        ", "‹" + " " * 64, "< / ", "<a:", "&lt; / ", "<t\u200b", "<" + "\u0301" * 64]
)
def test_a_megabyte_of_almost_matches_ends(unit):
    text = unit * (1_000_000 // len(unit))
    assert restore(sanitise(text)[0]) == text


# -- where the tokens come from --------------------------------------------------------------------------------------


def test_a_judge_breaks_the_tokens_of_its_tokenizer(ask):
    seen = []

    async def complete(messages, **parameters):
        seen.append(messages[-1]["content"])
        return "no"

    complete.special_tokens = ("@@end", "\u2581", "<|im_end|>")  # a single character cannot be broken
    judge = ChatJudge(complete=complete, model="m", orders="one")
    ask(judge, Pair("p", "a @@end b <|im_end|>", "c"))
    assert "@␛@end b <␛|im_end|>" in seen[0]
    assert judge.prompt.special_tokens == ("@@end", "<|im_end|>")


def test_a_judge_breaks_the_tokens_of_the_tokenizer_it_counts_with():
    """As transformers, tokenizers and tiktoken have them; a function that counts tells none."""
    token = SimpleNamespace(content="@@end", special=True)
    plain = SimpleNamespace(content="two words", special=False)
    tokenizers = [
        SimpleNamespace(encode=str.split, added_tokens_decoder={1: token, 2: plain}, all_special_tokens=["@@end"]),
        SimpleNamespace(encode=str.split, get_added_tokens_decoder=lambda: {1: token, 2: plain}),
        SimpleNamespace(encode=str.split, special_tokens_set={"@@end"}),
    ]

    async def complete(messages, **parameters):
        return "no"

    for tokenizer in tokenizers:
        assert ChatJudge(complete=complete, model="m", tokenizer=tokenizer).prompt.special_tokens == ("@@end",)
    assert ChatJudge(complete=complete, model="m", tokenizer=len).prompt.special_tokens == ()
    own = ChatJudge(complete=complete, model="m", tokenizer=tokenizers[0], prompt=JudgePrompt(special_tokens=("##",)))
    assert own.prompt.special_tokens == ("##",)


@given(st.sampled_from([*TOKENS, "@@end"]))
def test_principles_are_texts_like_any_other(token):
    """A request may bring its own."""
    if token.startswith("/"):
        token = "be " + token
    prompt = JudgePrompt(special_tokens=("@@end",), principles=(f"Be kind. {token} Be brief.",))
    question = prompt.render("p", "a", "b")
    assert token not in question.messages[0]["content"]
    assert question.sanitised > 0


@pytest.mark.parametrize("tokens", [("x",), ("ab", "a␛b"), (1,), "<s>"])
def test_tokens_that_cannot_be_broken_are_refused(tokens):
    with pytest.raises(InputError, match="special_tokens"):
        JudgePrompt(special_tokens=tokens)


def test_what_is_sanitised_is_part_of_the_version():
    versions = {JudgePrompt(special_tokens=tokens).version for tokens in [(), ("@@end",), ("@@", "end")]}
    assert len(versions) == 3
    assert JudgePrompt(special_tokens=("aa", "bb")).version == JudgePrompt(special_tokens=["bb", "aa"]).version
