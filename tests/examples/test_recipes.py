"""Every recipe trains as it stands, but for a small backbone; docs/training.md says what is planned."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rmcore.cli import app
from rmcore.model import RewardModel
from rmcore.model.plan import PlanConfig, plan_training

yaml = pytest.importorskip("yaml", reason="pyyaml is not installed (pip install 'rmcore[train]')")
pytest.importorskip("accelerate", reason="accelerate is not installed (pip install 'rmcore[train]')")

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "recipes"
H100 = {"peak_tflops": 989.0, "mfu": 0.4}
PLANNED = {
    "Llama-3.1-8B, SNGP": ("llama", "llama-3.1-8b-sngp", {"gpus": 8, "strategy": "fsdp", **H100}),
    "Llama-3.1-8B, HelpSteer2": (
        "llama",
        None,
        {"gpus": 8, "strategy": "fsdp", "batch": 8, "pairs": 10_000, "checkpointing": True, **H100},
    ),
    "Qwen3-0.6B": ("qwen3", "qwen3-0.6b-lora", {"peak_tflops": 165.0, "mfu": 0.3}),
    "SmolLM2-135M": (
        "smollm2",
        "smollm2-laptop",
        {"pairs": 2000, "prompt": 64, "response": 128, "peak_tflops": 0.14, "mfu": 0.6},
    ),
}


def described(name: str):
    """What the hub's config.json of each says, as far as a plan reads it."""
    import transformers as t

    if name == "qwen3":
        sizes = {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
        return t.Qwen3Config(
            **sizes, num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True
        )
    if name == "smollm2":
        sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        return t.LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    return t.LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072)


def test_the_docs_say_what_is_planned():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for start, (model, recipe, settings) in PLANNED.items():
        own = {} if recipe is None else yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
        read = {
            "mode": own.get("mode"), "batch": own.get("per_device_train_batch_size"), "lora": own.get("lora_r"),
            "checkpointing": own.get("activation_checkpointing"), "layer_size": own.get("layer_size"),
            "features": own.get("features"), "bf16": own.get("bf16", recipe is None),
        }  # fmt: skip
        plan = plan_training(
            described(model), PlanConfig(**{k: v for k, v in read.items() if v is not None} | settings)
        )
        row = re.search(rf"^\| {start}.*$", page, re.MULTILINE)
        assert row is not None, start
        cells = [cell.strip() for cell in row[0].split("|")]
        assert cells[3] == f"{plan.memory / 1e9:.1f} GB", start
        assert cells[4] == f"{plan.flop:.1e}".replace("e+", "e"), start
        assert cells[5].split(" ")[0] == f"{plan.hours:.2g}" or cells[5].split(" ")[0] == f"{plan.hours:.1f}", start


@pytest.fixture
def base(make_backbone, tmp_path) -> Path:
    backbone = make_backbone("llama", model={"num_hidden_layers": 2})
    backbone.model.save_pretrained(tmp_path / "base")
    backbone.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("[!a]*.yaml")))
def test_a_recipe_trains(recipe, base, preferences, tmp_path, monkeypatch):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in preferences]
    file.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    settings = [f"datasets=['{file}']", "held_out=0.3", "max_steps=2", "eval_steps=2", "bf16=false", "logging_steps=1"]
    if recipe.startswith("llama"):
        settings.append("report_to=none")  # wandb's run: test_loggers.py
    given = ["--backbone", base, "-o", tmp_path / "model", "--max-length", 128, "--device", "cpu", "--no-error-prior"]
    command = ["train", "--config", RECIPES / f"{recipe}.yaml", *given]
    command += [word for setting in settings for word in ("--set", setting)]
    result = CliRunner().invoke(app, [*map(str, command)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    model = RewardModel.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float32)
    assert model.score("tell me", ["a good fox", "a bad fox"]).preference.isfinite().all()


def test_accelerate_reads_its_configuration():
    from accelerate.commands.config import load_config_from_file

    config = load_config_from_file(str(RECIPES / "accelerate-fsdp.yaml"))
    assert config.distributed_type.value == "FSDP"
    assert config.fsdp_config["fsdp_version"] == 2
