"""Models of several attributes: trained from labelled responses, saved, loaded, scored, routed by, and exported."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support.families import LAYOUTS
from typer.testing import CliRunner

from rmcore import RewardEngine, RewardModel
from rmcore._base.errors import DataError, InputError
from rmcore.cli import app
from rmcore.head.attributes import HELPSTEER2, FitOptions
from rmcore.head.config import HeadConfig
from rmcore.model.attribute_export import export_urm
from rmcore.model.attribute_training import attribute_pairs, fit_attribute_model
from rmcore.model.backbone import Backbone
from rmcore.model.data import read_attributes

NAMES = ("helpfulness", "verbosity")
QUICK = FitOptions(steps=60, lr=1e-2)


def rows(names=NAMES) -> list[dict[str, object]]:
    """Two responses a prompt; the first attribute goes by a word, the second by length; one label is missing."""
    found = []
    for k in range(12):
        for word, score in (("good", 4), ("bad", 1)):
            labels = {name: (score if j == 0 else k % 3) for j, name in enumerate(names)}
            found.append(
                {"prompt": f"about number {k}", "response": f"a {word} answer {k}" + " too" * (k % 3), **labels}
            )
    found[3][names[1]] = None
    return found


@pytest.fixture(scope="module")
def backbone(tmp_path_factory, make_model, tokenizer_for) -> Backbone:
    path = tmp_path_factory.mktemp("bert")
    make_model("bert", tokenizer_for("bert")).save_pretrained(path)
    tokenizer_for("bert").save_pretrained(path)
    return Backbone.from_pretrained(str(path), device="cpu", pooling="mean")


@pytest.fixture(scope="module")
def urme(backbone) -> RewardModel:
    data = list(read_attributes(rows(), NAMES))
    config = HeadConfig(backbone.hidden_size, num_features=32, ridge=0.1)
    quick = {"options": QUICK, "gate_options": QUICK}
    model, found = fit_attribute_model(
        backbone, data, NAMES, members=2, config=config, dtype=torch.float32, progress=lambda *told: None, **quick
    )
    assert (found.responses, found.pairs, found.derived, found.ties) == (24, 12, True, 0)
    assert found.accuracy > 0.9
    return model


def test_rows_are_read_and_what_is_wrong_is_named_by_row():
    data = list(read_attributes(rows(), NAMES))
    assert data[2].labels == (4.0, 1.0)
    assert math.isnan(data[3].labels[1])
    assert (data[3].line, data[0].response) == (4, "a good answer 0")
    nested = [{"prompt": "p", "response": "r", "scores": {"overall": 4.5}}]
    columns = {"overall": "scores.overall"}
    assert next(read_attributes(nested, ["overall"], columns)).labels == (4.5,)
    for bad, says in (
        ({"helpfulness": 5}, r"row 2.*helpfulness: got 5.*from 0 to 4"),
        ({"helpfulness": "4"}, "row 2.*helpfulness: got '4', expected a number"),
        ({"verbosity": True}, "row 2.*verbosity"),
        ({"response": None}, "row 2.*response"),
        ({"prompt": 3}, "row 2.*prompt"),
    ):
        wrong = rows()
        wrong[1] |= bad
        with pytest.raises(DataError, match=says):
            list(read_attributes(wrong, NAMES))
    with pytest.raises(DataError, match=r"row 1.*correctness: missing.*null"):
        list(read_attributes(rows(), [*NAMES, "correctness"]))
    with pytest.raises(DataError, match="from 1 to 3"):
        list(read_attributes(rows(), NAMES, limits=(1, 3)))
    for names in ([], ["a", "a"], ["prompt"]):
        with pytest.raises(InputError, match="attributes"):
            list(read_attributes(rows(), names))


def test_pairs_are_made_of_one_attribute_within_a_prompt_and_ties_are_counted():
    data = list(read_attributes(rows(), NAMES))
    pairs, ties = attribute_pairs(data, 0)
    assert (len(pairs), ties) == (12, 0)
    assert all("good" in pair.chosen and "bad" in pair.rejected for pair in pairs)
    assert attribute_pairs(data, 1) == ([], 12)  # equal, or one is not labelled


def test_it_scores_attributes_with_both_kinds_of_variance_and_is_saved_with_it(urme, tmp_path):
    prompt, responses = "about number 3", ["a good answer 3", "a bad answer 3", "a good answer 3"]
    said = urme.score(prompt, responses)
    assert said.attributes is not None
    assert said.attributes.names == NAMES
    assert said.scores is not None
    assert said.epistemic is not None
    assert said.aleatoric is not None
    torch.testing.assert_close(said.variance, said.epistemic + said.aleatoric)
    torch.testing.assert_close(said.logit[0, 1], said.scores[0] - said.scores[1])
    assert float(said.aleatoric[0, 1]) > 0
    assert float(said.aleatoric[0, 2]) == 0  # equal responses are decided by rule
    torch.testing.assert_close(said.uncertainty[0, 1], (1 + math.pi / 8 * said.variance[0, 1]).sqrt())
    urme.save_pretrained(tmp_path / "m", backbone="embed")
    again = RewardModel.from_pretrained(tmp_path / "m", device="cpu")
    assert again.uncertainty == "urme"
    assert torch.equal(again.score(prompt, responses).preference, said.preference)
    for kind in ("epistemic", "aleatoric"):
        part = urme.score(prompt, responses, variance=kind)
        assert torch.equal(part.variance, getattr(said, kind))
        assert torch.equal(part.logit, said.logit)
    head = urme.score(prompt, responses, uncertainty="head")
    assert head.attributes is None
    assert head.epistemic is None
    assert torch.equal(head.logit, urme.score(prompt, responses, uncertainty="sngp").logit)
    with pytest.raises(InputError, match="head, urme"):
        urme.score(prompt, responses, uncertainty="urm")
    with pytest.raises(InputError, match="total"):
        urme.score(prompt, responses, variance="all")
    with pytest.raises(InputError, match="'aleatoric' of 'head'"):
        urme.score(prompt, responses, uncertainty="head", variance="aleatoric")


def test_an_engine_routes_by_the_part_it_is_asked_for(urme):
    prompts, responses = ["about number 3"], [["a good answer 3", "a bad answer 3", "another"]]
    for kind in (None, "epistemic", "aleatoric", "total"):
        scored = RewardEngine(urme, variance=kind).score(prompts, responses)
        said = urme.score(prompts, responses, variance=kind)[0]
        group = scored[0]
        for name in ("preference", "uncertainty", "variance", "epistemic", "aleatoric"):
            torch.testing.assert_close(getattr(group, name), getattr(said, name))
        record = group.to_record()
        assert record["aleatoric"][0][1] == pytest.approx(float(group.aleatoric[0, 1]))
        assert scored.advantage_variance is not None
    with pytest.raises(InputError, match="'urme', which the model is served with"):
        RewardEngine(urme, nonfinite="route", judge=_Silent(), router=_Never())
    with pytest.raises(InputError, match="head alone"):
        RewardEngine(urme, uncertainty="head", variance="total")
    with pytest.raises(InputError, match="'epistemic', 'aleatoric' or 'total'"):
        RewardEngine(urme, variance="both")  # type: ignore[arg-type]


class _Silent:
    async def judge(self, pairs):
        return []


class _Never:
    def select(self, candidates):
        return torch.zeros(len(candidates), dtype=torch.bool)


def test_what_cannot_be_trained_is_refused(backbone):
    data = list(read_attributes(rows(), NAMES))
    with pytest.raises(InputError, match="prefer"):
        fit_attribute_model(backbone, data, NAMES, prefer="wit")
    with pytest.raises(InputError, match="no pair, 12 ties"):
        fit_attribute_model(backbone, data, NAMES, prefer="verbosity")
    with pytest.raises(InputError, match="names"):
        fit_attribute_model(backbone, data, ["one"])
    with pytest.raises(InputError, match="rows"):
        fit_attribute_model(backbone, [], NAMES)
    with pytest.raises(InputError, match="concat"):
        fit_attribute_model(backbone, data, NAMES, config=HeadConfig(backbone.hidden_size, mode="concat"))


def test_a_model_of_helpsteers_attributes_is_written_in_the_published_layout(tmp_path):
    tiny = LAYOUTS["urm-gated"].make()
    base = tiny.write(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    backbone = Backbone.from_pretrained(str(base), device="cpu", pooling="last")
    data = list(read_attributes(rows(HELPSTEER2), HELPSTEER2))
    quick = {"options": QUICK, "gate_options": QUICK, "config": HeadConfig(backbone.hidden_size, num_features=16)}
    model, _ = fit_attribute_model(backbone, data, HELPSTEER2, dtype=torch.float32, **quick)
    export_urm(model, tmp_path / "out")
    published = RewardModel.from_pretrained(tmp_path / "out", device="cpu")
    assert published.backbone.config.family == "urm-gated"
    chat = [[{"role": "user", "content": "what is the capital of France?"}]]
    responses = [["Paris", "a dog"]]
    mine, theirs = model.score(chat, responses)[0], published.score(chat, responses)[0]
    for name in ("attributes", "attribute_weights", "attribute_std"):
        torch.testing.assert_close(
            getattr(mine.attributes, name), getattr(theirs.attributes, name), rtol=1e-4, atol=1e-4
        )
    torch.testing.assert_close(mine.scores, theirs.scores, rtol=1e-4, atol=1e-4)
    # the published one tells its answers' spread beside the posterior of its own head, which is nothing yet
    torch.testing.assert_close(theirs.aleatoric, mine.aleatoric, rtol=1e-4, atol=1e-5)
    total = published.score(chat, responses, variance="total")[0]
    torch.testing.assert_close(total.variance, theirs.aleatoric)
    scored = RewardEngine(published, variance="total").score(chat, responses)[0]
    torch.testing.assert_close(scored.uncertainty, total.uncertainty)
    torch.testing.assert_close(scored.aleatoric, theirs.aleatoric)
    with pytest.raises(InputError, match="estimators"):
        export_urm(published, tmp_path / "other")


def test_the_command_trains_saves_and_tells_of_bad_rows(backbone, tmp_path):
    def call(*arguments: object) -> object:
        return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "500", "TERM": "dumb"})

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    common = (
        "train",
        path,
        "--backbone",
        backbone.config.name,
        "--pooling",
        "mean",
        "--features",
        32,
        "--no-cache",
        "--steps",
        40,
    )
    named = ("--attributes", ",".join(NAMES))
    result = call(*common, *named, "--members", 2, "-o", tmp_path / "m")
    assert result.exit_code == 0, result.stderr
    assert (
        "24 labelled responses, 2 attributes; 12 pairs (made of helpfulness, 0 ties left out); 2 heads" in result.stderr
    )
    groups = tmp_path / "groups.jsonl"
    groups.write_text(json.dumps({"prompt": "about number 1", "responses": ["a good answer", "a bad one"]}) + "\n")
    found = {}
    for kind in ("total", "epistemic"):
        scored = call("score", tmp_path / "m", groups, "--variance", kind)
        assert scored.exit_code == 0, scored.stderr
        found[kind] = json.loads(scored.stdout)
    assert found["epistemic"]["variance"] == found["total"]["epistemic"]
    assert found["total"]["variance"][0][1] > found["epistemic"]["variance"][0][1]
    assert "aleatoric" not in json.loads(call("score", tmp_path / "m", groups, "--uncertainty", "head").stdout)
    for more, says in (
        (("--attributes", "helpfulness,wit"), "wit: missing"),
        ((*named, "--prefer", "wit"), "--prefer: got 'wit'"),
        ((*named, "--mode", "concat"), "--mode: got concat"),
        ((*named, "--tune"), "--attributes: got with --tune"),
        ((*named, "--label-range", "0"), "--label-range"),
        ((*named, "--weights", "1,2,3"), "weights"),
        (("--members", 2), "without --attributes"),
    ):
        refused = call(*common, *more, "-o", tmp_path / "n")
        assert refused.exit_code == 2, (more, refused.stderr)
        assert says in refused.stderr
    lines = path.read_text().splitlines()
    lines[4] = lines[4].replace('"helpfulness": 4', '"helpfulness": 9')
    path.write_text("\n".join(lines))
    refused = call(*common, *named, "-o", tmp_path / "n")
    assert refused.exit_code == 2
    assert "rows.jsonl:5: helpfulness: got 9" in refused.stderr
    export = call("export", tmp_path / "m", "-o", tmp_path / "urm")
    assert export.exit_code == 2
    assert "member" in export.stderr
