"""The forms of preference data: each is read as the pair it holds, or refused by its name."""

from __future__ import annotations

import contextlib
import logging
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore.model.data import parse_group, parse_preference, parse_preferences, read_preferences
from rmcore.model.data.preferences import FORMS, unused_columns


def user(text: str = "2+2?") -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ASKED = [user()]
WHOLE = ([user(), says("4")], [user(), says("5")])
TEXT = "\n\nHuman: 2+2?\n\nAssistant:"
TRL = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (TRL, "2+2?"),
        ({"prompt": "2+2?", "chosen": WHOLE[0], "rejected": WHOLE[1], "score_chosen": 8.0}, ASKED),
        ({"prompt": None, "chosen": WHOLE[0], "rejected": WHOLE[1]}, ASKED),
        ({"prompt": ASKED, "chosen": says("4"), "rejected": says("5")}, ASKED),
        ({"prompt": ASKED, "chosen": [says("4")], "rejected": says("5")}, ASKED),
        (
            {
                "input": {"messages": ASKED, "tools": [], "parallel_tool_calls": True},
                "preferred_output": [says("4")],
                "non_preferred_output": [says("5")],
            },
            ASKED,
        ),
        (
            {
                "context": ASKED,
                "completions": [{"rank": 1, "completion": [says("5")]}, {"rank": 0, "completion": [says("4")]}],
            },
            ASKED,
        ),
        ({"messages": [*ASKED, says("4")], "rejected_response": "5"}, ASKED),
        ({"messages": [*ASKED, says("4")], "rejected_response": ["5"]}, ASKED),
        ({"messages": [*ASKED, says("4")], "rejected_messages": [*ASKED, says("5")]}, ASKED),
        (
            {
                "conversations": [{"from": "human", "value": "2+2?"}],
                "chosen": {"from": "gpt", "value": "4"},
                "rejected": {"from": "gpt", "value": "5"},
            },
            ASKED,
        ),
        ({"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"}, ASKED),
        ({"question": "2+2?", "system": "", "chosen": "4", "rejected": "5"}, ASKED),
        ({"context": ASKED, "response1": "4", "response2": "5", "overall_preference": -2}, ASKED),
        ({"context": ASKED, "response1": "5", "response2": "4", "overall_preference": 3}, ASKED),
        ({"history": "2+2?", "human_ref_A": "4", "human_ref_B": "5", "labels": 1, "score_ratio": 2.0}, "2+2?"),
        ({"history": "2+2?", "human_ref_A": "5", "human_ref_B": "4", "labels": 0}, "2+2?"),
        ({"prompt": "2+2?", "response_0": "5", "response_1": "4", "better_response_id": 1}, "2+2?"),
        ({"conversation_a": WHOLE[1], "conversation_b": WHOLE[0], "winner": "model_b"}, ASKED),
        ({"messages": ASKED, "chosen": says("4"), "rejected": says("5")}, ASKED),
        ({"conversation": ASKED, "chosen": says("4"), "rejected": says("5")}, ASKED),
        ({"conversation": [{"from": "human", "value": "2+2?"}], "chosen": "4", "rejected": "5"}, ASKED),
        (
            {"system": "s", "input": "2+2?", "chosen": "4", "rejected": "5"},
            [{"role": "system", "content": "s"}, *ASKED],
        ),
        ({"input": "2+2?", "chosen": "4", "rejected": "5"}, "2+2?"),
        ({"instruction": "2+2?", "chosen_response": "4", "rejected_response": "5"}, ASKED),
        # Beside whole conversations these columns are no prompt.
        ({"messages": WHOLE[0], "chosen": WHOLE[0], "rejected": WHOLE[1]}, ASKED),
        ({"input": "", "chosen": WHOLE[0], "rejected": WHOLE[1]}, ASKED),
    ],
)
def test_every_form_gives_its_pair(row: dict[str, Any], prompt: object) -> None:
    pair = parse_preference(row)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.label) == (prompt, "4", "5", 1.0)


def test_every_form_is_covered_above() -> None:
    (mark,) = test_every_form_gives_its_pair.pytestmark  # type: ignore[attr-defined]
    given = [set(row) for row, _ in mark.args[1]]
    assert all(any(set(form.columns) <= names for names in given) for form in FORMS)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": TEXT + " 4", "rejected": TEXT + " 5"},
        {"prompt": TEXT, "chosen": TEXT + " 4", "rejected": TEXT + " 5"},
    ],
)
def test_dialogues_written_as_text_end_their_prompt_with_assistant(row: dict[str, Any]) -> None:
    pair = parse_preference(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == (TEXT, " 4", " 5")


@given(st.text(), st.text(), st.text())
def test_a_dialogue_is_cut_where_its_last_common_question_ends(question: str, better: str, worse: str) -> None:
    start = f"\n\nHuman: {question}\n\nAssistant:"
    pair = parse_preference({"chosen": start + better, "rejected": start + worse})
    assert str(pair.prompt) + str(pair.chosen) == start + better
    assert str(pair.prompt) + str(pair.rejected) == start + worse
    assert str(pair.prompt).startswith(start)


def test_turns_that_part_early_are_responses_of_several_messages() -> None:
    rows = [[user(), says(answer), user("sure?"), says("yes")] for answer in ("4", "5")]
    pair = parse_preference({"chosen": rows[0], "rejected": rows[1]})
    assert pair.prompt == ASKED
    assert pair.chosen == rows[0][1:]
    assert pair.rejected == rows[1][1:]


def test_systems_and_histories_are_part_of_the_prompt() -> None:
    system = {"role": "system", "content": "Be brief."}
    alpaca = {"instruction": "add", "input": "2, 2", "system": "Be brief.", "history": [["hi", "hello"]]}
    pair = parse_preference({**alpaca, "chosen": "4", "rejected": "5"})
    assert pair.prompt == [system, user("hi"), says("hello"), user("add\n2, 2")]
    assert parse_preference({"question": "2+2?", "system": "Be brief.", "chosen": "4", "rejected": "5"}).prompt == [
        system,
        *ASKED,
    ]
    turns = [{"from": "human", "value": "2+2?"}]
    row = {"conversations": turns, "system": "Be brief.", "chosen": "4", "rejected": "5"}
    assert parse_preference(row).prompt == [system, *ASKED]


def test_an_agents_answer_is_all_that_follows_the_last_question() -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]}
    messages = [*ASKED, call, {"role": "tool", "content": "4"}, says("4")]
    pair = parse_preference({"messages": messages, "rejected_response": "5"})
    assert pair.prompt == ASKED
    assert [message["role"] for message in pair.chosen] == ["assistant", "tool", "assistant"]  # type: ignore[index]


# -- several pairs a row ---------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 4))
def test_lists_are_every_chosen_with_every_rejected(better: int, worse: int) -> None:
    row = {
        "id": "1",
        "prompt": "2+2?",
        "chosen": [f"good {k}" for k in range(better)],
        "rejected": [f"bad {k}" for k in range(worse)],
        "subset": "Math",
    }
    pairs = parse_preferences(row)
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {
        (good, bad) for good in row["chosen"] for bad in row["rejected"]
    }
    assert len(pairs) == better * worse
    assert parse_group(row).responses == (*row["chosen"], *row["rejected"])
    assert parse_group(row).id == "1"
    assert len(list(read_preferences([row]))) == better * worse


def test_a_single_preference_is_not_taken_from_several() -> None:
    with pytest.raises(InputError, match="got 3 pairs, expected one"):
        parse_preference({"prompt": "2+2?", "chosen": ["4"], "rejected": ["5", "6", "7"]})


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=5))
def test_ranks_order_pairs_and_equal_ranks_are_even(ranks: list[int]) -> None:
    completions = [{"rank": rank, "completion": [says(f"{k}")]} for k, rank in enumerate(ranks)]
    pairs = parse_preferences({"context": ASKED, "completions": completions})
    assert len(pairs) == len(ranks) * (len(ranks) - 1) // 2
    for pair in pairs:
        better, worse = ranks[int(str(pair.chosen))], ranks[int(str(pair.rejected))]
        assert (better, pair.label) == (worse, 0.5) or (better < worse and pair.label == 1.0)
    group = parse_group({"context": ASKED, "completions": completions})
    assert group.responses == tuple(str(k) for k in range(len(ranks)))


@pytest.mark.parametrize(
    "row",
    [
        {"context": ASKED, "response1": "4", "response2": "5", "overall_preference": 0},
        {"conversation_a": WHOLE[0], "conversation_b": WHOLE[1], "winner": "tie (bothbad)"},
    ],
)
def test_ties_are_even(row: dict[str, Any]) -> None:
    assert parse_preference(row).label == 0.5


# -- label and margins -----------------------------------------------------------------------------------------------


@given(st.floats() | st.integers())
def test_a_label_is_a_probability_of_at_least_a_half_or_an_error(label: float) -> None:
    row = {**TRL, "label": label}
    if 0.5 <= label <= 1:
        pair = parse_preference(row)
        assert (pair.chosen, pair.label) == ("4", label)
    else:
        with pytest.raises(InputError, match="label: got"):
            parse_preference(row)


@pytest.mark.parametrize(
    "label",
    [
        *(True, False, "0.3", "1", "nan", [1], {"p": 1}, "rejected", " Chosen ", "B", "tie", "True", b"1", 10**400),
        *(-(10**5000), Decimal("NaN"), Decimal("1.5"), Fraction(7, 5), 1j),
    ],
    ids=lambda label: type(label).__name__,
)
def test_other_labels_are_errors(label: object) -> None:
    with pytest.raises(InputError, match="label: got"):
        parse_preference({**TRL, "label": label})


def test_numbers_of_any_kind_are_labels() -> None:
    import numpy as np

    for label in (Decimal("0.75"), Fraction(3, 4), np.float32(0.75), np.float64(0.75)):
        assert parse_preference({**TRL, "label": label}).label == 0.75
    assert parse_preference({**TRL, "label": np.int64(1)}).label == 1.0


def test_one_response_beside_a_list_is_no_pair() -> None:
    for row, said in (
        ({**TRL, "chosen": ["4"]}, "chosen: got a list of responses beside one response in rejected"),
        ({**TRL, "rejected": ["5", "6"]}, "rejected: got a list of responses beside one response in chosen"),
        ({**TRL, "rejected": []}, "rejected: got an empty list"),
        ({**TRL, "chosen": []}, "chosen: got an empty list"),
    ):
        with pytest.raises(InputError, match=said):
            parse_preferences(row)
    assert len(parse_preferences({**TRL, "chosen": ("4",), "rejected": ("5", "6")})) == 2


def test_ranks_of_any_numbers_order() -> None:
    row = {"context": ASKED, "completions": [{"rank": r, "completion": [says(str(r))]} for r in (1.5, 0.0)]}
    assert parse_preference(row).chosen == "0.0"
    row["completions"][0]["rank"] = float("nan")  # type: ignore[index]
    with pytest.raises(InputError, match=r"completions\[0\]\.rank"):
        parse_preference(row)


def test_a_label_of_0_is_told_what_it_would_mean() -> None:
    with pytest.raises(InputError, match=r"label: got 0, expected a number in \[0.5, 1\]. Below it, rejected would be"):
        parse_preference({**TRL, "label": 0})
    assert parse_preference({**TRL, "label": None}).label == 1.0


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"margin": 2.5}, ["margin"]),
        ({"score_chosen": 8, "score_rejected": 0.0}, ["score_chosen", "score_rejected"]),
        ({"label": "crowd"}, ["label"]),
        ({"chosen-rating": 5.0, "Confidence": 0.9, "sample_weight": 2, "rewards": [1, 0]}, "each"),
        ({"chosen_avg_rating": 4.5, "strength": "strong", "p.probability": 1}, "each"),
        ({"problem": "x", "scorer": "y", "weighted": 1, "chosen_model": "m", "id": 3, "subset": "s"}, []),
        ({"tools": [{"type": "function"}]}, ["tools"]),
        ({"margin": None, "tools": [], "source": "x"}, []),
    ],
)
def test_columns_that_are_not_used_are_told_once(
    columns: dict[str, Any], told: list[str] | str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(list(read_preferences([{**TRL, **columns}] * 3))) == 3
    assert [record.getMessage().split(" is not used")[0] for record in caplog.records] == [
        f"list: the column {name}" for name in (list(columns) if told == "each" else told)
    ]


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired .KTO."),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "stepwise supervision"),
        ({"prompt": "a", "responses": ["b"]}, "a group of responses, as rmcore score reads them"),
        ({"prompt": "a", "answers": []}, "Nectar"),
        ({"instruction": "a", "completions": []}, "ultrafeedback_binarized"),
        ({"messages": ASKED}, "one conversation"),
        ({"q": "a", "better": "b"}, r"expected keys prompt, chosen, rejected .found \['better', 'q'\].*--columns"),
        ({**TRL, "images": ["cat.png"]}, "images: got images, video or sound, expected text only"),
        ({**TRL, "chosen": None}, "chosen: got"),
        ({**TRL, "chosen": {"role": "user", "content": "x"}}, "chosen"),
        ({"input": [], "preferred_output": [], "non_preferred_output": []}, "input: got list"),
        ({"context": ASKED, "completions": [{"rank": "a", "completion": "b"}] * 2}, r"completions\[0\].rank"),
        ({"context": ASKED, "completions": [{"completion": "b"}]}, "a list of at least two"),
        ({"context": ASKED, "response1": "4", "response2": "5", "overall_preference": 9}, "overall_preference: got 9"),
        ({"history": "h", "human_ref_A": "4", "human_ref_B": "5", "labels": "1"}, "labels: got '1', expected one of"),
        ({"messages": ASKED, "rejected_response": "5"}, "a question, then the chosen answer"),
        ({"conversations": [{"from": "bot", "value": ""}], "chosen": "a", "rejected": "b"}, "from: got 'bot'"),
        ({"conversations": "x", "chosen": "a", "rejected": "b"}, "conversations: got str"),
        ({"instruction": "x", "history": ["y"], "chosen": "a", "rejected": "b"}, r"history\[0\]: got str"),
    ],
)
def test_other_forms_are_refused_by_name(row: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_preference(row)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "rank", "completion"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@given(data=st.data())
def test_no_row_whatsoever_raises_anything_but_input_errors(form: Any, data: st.DataObject) -> None:
    row = data.draw(st.fixed_dictionaries(dict.fromkeys(form.columns, json_values), optional={"label": json_values}))
    for read in (parse_preferences, parse_group):
        with contextlib.suppress(InputError):
            assert read(row)


# -- other inputs of the same kinds ------------------------------------------------------------------------------------


def test_a_label_that_names_a_side_is_refused_in_any_spelling():
    row = {"prompt": "q", "chosen": "g", "rejected": "b"}
    sides = "A|b|model_a|Model B|response_1|first|Tie (bothbad)|A>>B|b > a|1 > 2|chosen is better|a is much better|both"
    for label in [*sides.split("|"), "the second response", "equal", "left", "assistant A", "1.0", "\uff11", "0"]:
        with pytest.raises(InputError, match=r"label: got .*, a text, expected a number"):
            parse_preference({**row, "label": label})
    for label in ("annotator_3", "helpful", "gpt-4", "model", "Anna B", "", "none", "safety/1"):
        assert parse_preference({**row, "label": label}).label == 1.0
        assert unused_columns({**row, "label": label}) == ["label"]
    for label in (True, False, [1], {"label": 1}, 10**400, -1, 1.5, float("inf")):
        with pytest.raises(InputError, match="label: got"):
            parse_preference({**row, "label": label})


def test_columns_that_say_otherwise_are_told(caplog):
    row = {"prompt": "q", "chosen": "g", "rejected": "b"}
    for name in ("winner", "is_swapped", "human_preference", "better", "Preferred", "overall_verdict"):
        assert unused_columns({**row, name: "rejected"}) == [name]
    rows = [{**row, "score_chosen": k, "score_rejected": 5} for k in range(8)] + [{**row, "margin": -1.0}, row]
    assert len(list(read_preferences(rows))) == 10
    assert "in 5 rows score_chosen and score_rejected say that rejected is the better one" in caplog.text
    assert "in 1 rows margin say" in caplog.text


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (("prompt", "response", "helpfulness"), "HelpSteer2"),
        (("question", "response_A", "response_B", "label"), "JudgeBench"),
        (("prompt", "response_a", "response_b", "winner_model_a"), "Chatbot Arena"),
        (("question", "answer_0", "answer_1", "score_0"), "WebGPT"),
        (("info", "summaries", "choice"), "summarize-from-feedback"),
    ],
)
def test_more_forms_that_hold_no_pairs_are_refused_by_name(columns, name):
    with pytest.raises(InputError, match=name):
        parse_preferences(dict.fromkeys(columns, "x"))


@pytest.mark.parametrize("label", ["75%", "0,75", " 0.75 ", "1/2", "½", "٠٫٧٥", "０．３", "nan", "-inf", "1e-1", "1_0"])
def test_a_number_in_words_is_no_word(label):
    """Read as a word it would be told as unused, and the pair be trained on as certain."""
    with pytest.raises(InputError, match=r"label: got .*, a text, expected a number in"):
        parse_preference({"prompt": "p", "chosen": "a", "rejected": "b", "label": label})


def test_a_word_with_a_digit_names_who_labelled(caplog):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "label": "annotator-7"}
    assert parse_preference(row).label == 1.0
    assert unused_columns(row) == ["label"]
