"""A chat template that asks what day it is gets one answer, whatever the clock says."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import jinja2.sandbox
import pytest
import transformers.utils.chat_template_utils as transformers_templates
from hypothesis import given
from hypothesis import strategies as st
from support.old_folders import as_0_1_0_wrote_it

from rmcore._base.errors import InputError
from rmcore.model import Backbone, BackboneConfig, RewardModel
from rmcore.model.template_date import pinned_template, reads_clock

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
ASKS = "System: today is {{ strftime_now('%d %b %Y') }}\n" + CHATML
# As Llama 3's: the date is the caller's, else the clock's where there is one.
ASKS_IF_DEFINED = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y')"
    " %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}Today Date: {{ date_string }}\n"
    + CHATML
)
PROMPT = [{"role": "user", "content": "what day is it?"}]


def at(monkeypatch: pytest.MonkeyPatch, year: int) -> None:
    """Turn the clock that transformers and rmcore read."""

    class Then(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(year, 3, 4, 5, 6, 7)

    class Today(datetime.date):
        @classmethod
        def today(cls):
            return cls(year, 3, 4)

    monkeypatch.setattr(transformers_templates, "datetime", Then)
    monkeypatch.setattr("rmcore.model.backbone.datetime.date", Today)


@pytest.fixture
def clocked(make_model, tokenizer_for, tmp_path: Path):
    """A folder with a decoder whose template asks the clock."""

    def make(template: str) -> Path:
        tokenizer = tokenizer_for("chatml")
        folder = tmp_path / "clocked"
        make_model("qwen2", tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return folder

    return make


@pytest.mark.parametrize("template", [ASKS, ASKS_IF_DEFINED])
@pytest.mark.parametrize("embed", [True, False])
def test_a_saved_model_gives_the_same_score_on_every_day(
    clocked, template, embed, preferences, tmp_path, monkeypatch, caplog
):
    at(monkeypatch, 2026)
    backbone = Backbone.from_pretrained(str(clocked(template)), pooling="mean", chat="always")
    model, _ = RewardModel.fit(backbone, preferences, num_features=32)
    before = model.score([PROMPT], [["a", "bbb"]])[0].rewards
    model.save_pretrained(tmp_path / "saved", backbone="embed" if embed else "name")
    assert json.loads((tmp_path / "saved" / "rmcore.json").read_text())["backbone"]["date"] == "2026-03-04"
    at(monkeypatch, 2031)
    assert model.score([PROMPT], [["a", "bbb"]])[0].rewards.equal(before)
    again = RewardModel.from_pretrained(tmp_path / "saved")
    assert again.score([PROMPT], [["a", "bbb"]])[0].rewards.equal(before)
    assert not caplog.records


def test_the_template_is_told_the_date_and_renders_the_rest_as_before(clocked, monkeypatch):
    at(monkeypatch, 2031)
    for template in (ASKS, ASKS_IF_DEFINED):
        backbone = Backbone.from_pretrained(str(clocked(template)), date="2026-11-27")
        shown = backbone.tokenizer.decode(backbone.encoder.encode(PROMPT, "Friday").ids)
        asked = backbone.tokenizer.apply_chat_template(
            [*PROMPT, {"role": "assistant", "content": "Friday"}], tokenize=False
        )
        assert "27 Nov 2026" in shown
        assert shown == asked.replace("04 Mar 2031", "27 Nov 2026")


def test_a_folder_without_a_date_says_that_scores_follow_the_day(clocked, preferences, tmp_path, caplog):
    backbone = Backbone.from_pretrained(str(clocked(ASKS)), pooling="mean")
    RewardModel.fit(backbone, preferences, num_features=32)[0].save_pretrained(tmp_path / "saved")
    as_0_1_0_wrote_it(tmp_path / "saved")
    RewardModel.from_pretrained(tmp_path / "saved")
    assert "asks what day it is" in caplog.text


def test_a_template_without_a_clock_has_no_date(make_backbone):
    assert make_backbone("qwen2").config.date is None


@pytest.mark.parametrize("bad", ["today", "2026-02-30", "27.11.2026", ""])
def test_a_date_that_is_none_is_refused(bad):
    with pytest.raises(InputError, match="YYYY-MM-DD"):
        BackboneConfig(date=bad)


def rendered(template: str) -> str:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render()


@given(
    st.dates(min_value=datetime.date(1000, 1, 1)),
    st.lists(st.sampled_from([*"aAbBcdDeFGHIjklmMpPRrSTuUVwWxXyYfhnCzZ", "-d", "-m", "-H", "-j", "%", " ", "-"])),
)
def test_directives_say_what_strftime_says(date, names):
    text = "".join(name if name in (" ", "-") else f"%{name}" for name in names)
    wanted = datetime.datetime(date.year, date.month, date.day).strftime(text)
    assert rendered(pinned_template(f"{{{{ strftime_now({json.dumps(text)}) }}}}", date)) == wanted


@given(st.text(alphabet="a \n{%}-", max_size=12))
def test_what_surrounds_the_question_stays(text):
    before = text.replace("{", "").replace("}", "")
    template = f"{before}{{% if true %}}\n{{{{ strftime_now('%Y') }}}}{{% endif %}}\n{before}"
    plain = template.replace("{{ strftime_now('%Y') }}", "2026")
    assert rendered(pinned_template(template, datetime.date(2026, 1, 1))) == rendered(plain)


def test_named_templates_are_looked_through(tokenizer_for):
    class Many:
        chat_template = {"default": CHATML, "tool_use": ASKS}  # noqa: RUF012

    assert reads_clock(Many())
    assert not reads_clock(tokenizer_for("chatml"))
    assert not reads_clock(tokenizer_for("bert"))
