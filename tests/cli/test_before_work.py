"""What is wrong with the options is found before a model is loaded; what ends a command early says what is kept."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from rmcore.cli import app, build_engine
from rmcore.cli.options import Judging
from rmcore.engine.routing import BudgetRouter, LearnedRouter, LearnedScore, NeverRoute, ThresholdRouter
from rmcore.model import Backbone, RewardModel
from rmcore.model.text_states import TextStates


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def model(tmp_path: Path, backbone_path: Path, preferences: Path) -> Path:
    out = tmp_path / "model"
    result = call("train", preferences, "--backbone", backbone_path, "--pooling", "mean", "--features", 16, "-o", out)
    assert result.exit_code == 0, result.stderr
    return out


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    path = tmp_path / "groups.jsonl"
    path.write_text(json.dumps({"prompt": "red tree", "responses": ["good clear", "bad rude"]}) + "\n")
    return path


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each model that is loaded."""
    seen: list[str] = []
    load = Backbone.from_pretrained.__func__

    def watched(cls, config, **options):
        seen.append(getattr(config, "name", config))
        return load(cls, config, **options)

    monkeypatch.setattr(Backbone, "from_pretrained", classmethod(watched))
    return seen


JUDGE = ("--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m")
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        pytest.param(["--device", "cuda"], "--device: got 'cuda', which cannot be used here", marks=NO_CUDA),
        (["--device", "gpu"], "--device: got 'gpu'"),
        (["--device", "cpu:x"], "--device: got 'cpu:x'"),
        (["--device", "meta"], "--device: got 'meta'"),
        pytest.param(["--backend", "cuda"], "--backend: got 'cuda', which cannot run here", marks=NO_CUDA),
        (["--threshold", "1.5"], "judge: got None, expected --judge-url or --verdicts"),
        (["--budget", "0.1"], "judge: got None, expected --judge-url or --verdicts"),
        (["--judge-fraction", "0.1"], "judge: got None, expected --judge-url or --verdicts"),
        ([*JUDGE, "--judge-key-env", ""], "the judge is never asked"),
        ([*JUDGE, "--budget", "0.1"], "--judge-key-env: got OPENAI_API_KEY, and no such variable is set"),
        ([*JUDGE, "--budget", "0.1", "--judge-key-env", "MY_KEY"], "--judge-key-env: got MY_KEY"),
        ([*JUDGE, "--budget", "0.1", "--judge-key-env", "", "--judge-deadline", "-3"], "--judge-deadline: got -3"),
        (["-o", "{file}/results.jsonl"], "--out: got"),
        (["--accounts", "{file}/accounts.jsonl"], "--accounts: got"),
        (["--ray-actors", "3"], "--ray-actors, --ray-gpus, --ray-cpus: got without --ray"),
        ([*JUDGE, "--judge-key-env", "", "--judge-fraction", "0.1", "--router-state", "/"], "--router-state: got '/'"),
    ],
)
@pytest.mark.parametrize("command", ["score", "best-of", "filter"])
def test_scoring_checks_its_options_first(command, options, told, model, groups, tmp_path, loads, monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("MY_KEY", raising=False)
    (tmp_path / "file").touch()
    options = [option.replace("{file}", str(tmp_path / "file")) for option in options]
    result = call(command, model, groups, *options, *(["--max-u", "2"] if command == "filter" else []))
    assert result.exit_code in (1, 2), result.output
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1, "one line, no traceback"
    assert loads == []


def test_a_judge_with_its_key_is_taken(model, groups, loads, monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", "x")
    assert call("score", model, groups, *JUDGE, "--budget", "0.1", "--judge-key-env", "MY_KEY").exit_code == 0
    assert len(loads) == 1


TRAINING = [
    pytest.param(["--device", "cuda"], "--device: got 'cuda'", marks=NO_CUDA),
    (["--ridge", "-1"], "--ridge: got -1"),
    (["-o", "{full}"], "--out: got"),
    (["-o", "{file}"], "--out: got"),
    (["-o", "{file}/deeper/model"], "--out: got"),
]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        *TRAINING,
        (["--features", "0"], "--features: got 0"),
        (["--kernel-scale", "nan"], "--kernel-scale: got nan"),
        (["--length-scale-factor", "0"], "--length-scale-factor: got 0"),
        (["--epochs", "3"], "--epochs: got 3"),
        (["--finetune-epochs", "-1"], "--finetune-epochs: got -1"),
        (["--lr-backbone", "0"], "--lr-backbone: got 0"),
        (["--layer-size", "0"], "--layer-size: got 0"),
    ],
)
def test_training_checks_its_options_first(options, told, backbone_path, preferences, tmp_path, loads) -> None:
    check_training(("train", preferences, "--backbone", backbone_path), options, told, tmp_path, loads)


@pytest.mark.parametrize(("options", "told"), TRAINING)
def test_upgrading_checks_its_options_first(options, told, classifier_path, preferences, tmp_path, loads) -> None:
    check_training(("upgrade", classifier_path, preferences), options, told, tmp_path, loads)


def check_training(command, options, told, tmp_path: Path, loads) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").touch()
    (tmp_path / "file").touch()
    options = [o.replace("{full}", str(full)).replace("{file}", str(tmp_path / "file")) for o in options]
    result = call(*command, *([] if "-o" in options else ["-o", tmp_path / "out"]), *options)
    assert result.exit_code == 2, result.output
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert loads == []
    assert [p.name for p in full.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--device", "gpu"], "--device"), (["-o", "{file}"], "--out"), (["--replicates", "0"], "--repl")],
)
def test_evaluating_checks_its_options_first(options, told, model, held_out, tmp_path, loads) -> None:
    (tmp_path / "file").touch()
    result = call("evaluate", model, held_out, *[o.replace("{file}", str(tmp_path / "file")) for o in options])
    assert result.exit_code == 2
    assert told in result.stderr
    assert loads == []


# -- work that is not done twice -------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RMCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Texts of each forward pass."""
    seen: list[int] = []
    forward = TextStates.padded

    def counted(self, ids):
        seen.append(len(ids))
        return forward(self, ids)

    monkeypatch.setattr(TextStates, "padded", counted)
    return seen


def train(preferences: Path, backbone_path: Path, out: Path, *options: object) -> Result:
    fixed = ("--backbone", backbone_path, "--pooling", "mean", "--features", 16, "-o", out)
    return call("train", preferences, *fixed, *options)


def test_a_sweep_encodes_once(preferences, held_out, backbone_path, tmp_path, cache, passes) -> None:
    assert train(preferences, backbone_path, tmp_path / "0").exit_code == 0
    first = len(passes)
    assert first
    for k, option in enumerate((("--ridge", 3), ("--kernel-scale", 1), ("--likelihood", "gaussian")), 1):
        assert train(preferences, backbone_path, tmp_path / str(k), *option).exit_code == 0
    assert len(passes) == first
    assert train(preferences, backbone_path, tmp_path / "again", "--no-cache").exit_code == 0
    assert len(passes) == 2 * first
    assert call("evaluate", tmp_path / "0", held_out, "--replicates", 5).exit_code == 0
    encoded = len(passes)
    assert call("evaluate", tmp_path / "2", held_out, "--replicates", 5).exit_code == 0
    assert len(passes) == encoded
    texts = [row[key] for row in map(json.loads, preferences.read_text().splitlines()) for key in ("prompt", "chosen")]
    kept = b"".join(file.read_bytes() for file in cache.rglob("*") if file.is_file())
    assert not [text for text in texts if text.encode() in kept], "states are kept, texts are not"


def test_upgrade_encodes_once(preferences, classifier_path, tmp_path, cache, passes) -> None:
    for ridge in (1, 2, 5):
        assert (
            call("upgrade", classifier_path, preferences, "-o", tmp_path / str(ridge), "--ridge", ridge).exit_code == 0
        )
    first = len(passes)
    assert call("upgrade", classifier_path, preferences, "-o", tmp_path / "b", "--no-cache").exit_code == 0
    assert len(passes) == 2 * first


def test_an_interrupted_run_says_what_is_kept_and_goes_on(
    preferences, backbone_path, tmp_path, cache, monkeypatch
) -> None:
    forward = TextStates.padded
    done: list[int] = []

    def interrupted(self, ids):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(len(ids))
        return forward(self, ids)

    monkeypatch.setattr(
        "rmcore.model.text_states.length_batches", lambda lengths, _: [[k] for k in range(len(lengths))]
    )
    monkeypatch.setattr(TextStates, "padded", interrupted)
    result = train(preferences, backbone_path, tmp_path / "rm")
    assert result.exit_code == 130
    assert f"interrupted; {sum(done)} encoded texts are kept in {cache}" in result.stderr
    monkeypatch.setattr(TextStates, "padded", forward)
    result = train(preferences, backbone_path, tmp_path / "rm")
    assert result.exit_code == 0, result.stderr
    without = train(preferences, backbone_path, tmp_path / "rm2", "--no-cache")
    assert without.exit_code == 0
    monkeypatch.setattr(TextStates, "padded", interrupted)
    assert "nothing is kept" in train(preferences, backbone_path, tmp_path / "rm3", "--no-cache").stderr


def test_a_disk_that_is_full_after_the_fit_loses_nothing(preferences, backbone_path, tmp_path, monkeypatch) -> None:
    save = RewardModel.save_pretrained
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def full(self, path, **options):
        if Path(path) == tmp_path / "rm":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(self, path, **options)

    monkeypatch.setattr(RewardModel, "save_pretrained", full)
    result = train(preferences, backbone_path, tmp_path / "rm")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    spare = Path(result.stderr.rsplit("The model is in ", 1)[1].split(" instead", 1)[0])
    RewardModel.from_pretrained(spare, device="cpu")

    def nowhere(self, path, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(RewardModel, "save_pretrained", nowhere)
    result = train(preferences, backbone_path, tmp_path / "rm")
    assert result.exit_code == 1
    assert "The model is lost; nothing is kept" in result.stderr


@pytest.mark.usefixtures("remote_code")
def test_code_that_comes_with_a_model_runs_where_asked_for_and_nobody_is_asked(
    backbone_path, preferences, tmp_path
) -> None:
    import shutil

    folder = tmp_path / "own"
    shutil.copytree(backbone_path, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "bert_own", "auto_map": {"AutoConfig": "code.Own", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        "from transformers import BertConfig, BertModel\nclass Own(BertConfig):\n    model_type = 'bert_own'\n"
        "class Model(BertModel):\n    config_class = Own\n"
    )
    command = ["train", str(preferences), "--backbone", str(folder), "--pooling", "mean", "--features", "16"]
    command += ["-o", str(tmp_path / "rm")]
    refused = CliRunner().invoke(app, command, input="y\n")
    assert refused.exit_code == 1
    assert "trust_remote_code" in refused.stderr
    assert "[y/N]" not in refused.output
    assert CliRunner().invoke(app, [*command, "--trust-remote-code"]).exit_code == 0
    groups = json.dumps({"prompt": "red", "responses": ["good", "bad"]}) + "\n"
    assert CliRunner().invoke(app, ["score", str(tmp_path / "rm"), "-"], input=groups).exit_code == 1
    scored = CliRunner().invoke(app, ["score", str(tmp_path / "rm"), "-", "--trust-remote-code"], input=groups)
    assert scored.exit_code == 0, scored.stderr
    (folder / "code.py").write_text((folder / "code.py").read_text() + "# changed\n")
    changed = CliRunner().invoke(app, ["score", str(tmp_path / "rm"), "-", "--trust-remote-code"], input=groups)
    assert changed.exit_code == 1
    assert "code.py changed" in changed.stderr


def test_how_safetensors_reports_a_full_disk_is_an_error_of_the_disk(model, tmp_path, monkeypatch) -> None:
    from safetensors import SafetensorError

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    loaded = RewardModel.from_pretrained(model, device="cpu")
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        loaded.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_score_to_route_by_is_learned_unless_there_is_a_threshold():
    def router(**given):
        judging = Judging(**given)
        return build_engine._router(judging, build_engine._adaptive_router(judging))

    assert isinstance(router(budget=0.1), LearnedRouter)
    assert isinstance(router(judge_fraction=0.1).by, LearnedScore)
    assert router(budget=0.1, rank_by="u") == BudgetRouter(0.1, by="u")
    assert router(threshold=1.4) == ThresholdRouter(1.4, by="u")
    assert router(threshold=0.4, rank_by="learned").threshold == 0.4
    assert isinstance(router(), NeverRoute)
