"""URM's first stage: the loss of labelled pairs by hand, and both stages end to end by the example's own commands."""

from __future__ import annotations

import json
import math
import random
import runpy
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("accelerate", reason="accelerate is not installed (pip install 'rmcore[train]')")

from rmcore._base.errors import InputError
from rmcore.cli import app
from rmcore.head.attributes.losses import gaussian_nll
from rmcore.integrations.training import AttributeLoss, PairBatch, attribute_training_pairs, bradley_terry
from rmcore.model import RewardModel
from rmcore.model.data.attributes import AttributeRow

EXAMPLE = Path(__file__).parents[3] / "examples" / "train_urm.py"


def test_pairs_of_a_prompts_responses():
    nan = math.nan
    rows = [AttributeRow("p", "a", (3.0, 1.0)), AttributeRow("q", "b", (1.0, 0.0)), AttributeRow("p", "c", (4.0, nan))]
    rows += [AttributeRow("q", text, (grade, 0.0)) for text, grade in (("d", 1.0), ("e", 0.0))]
    rows.append(AttributeRow("alone", "f", (1.0, 1.0)))
    pairs = attribute_training_pairs(rows)
    told = [(p.prompt, p.chosen, p.rejected, p.label) for p in pairs]
    assert told == [("p", "a", "c", 0.0), ("q", "b", "d", 0.5), ("q", "d", "e", 1.0), ("q", "e", "b", 0.0)]
    assert pairs[0].columns["attributes"][0] == (3.0, 1.0)
    assert [p.label for p in attribute_training_pairs(rows[:3], by=1)] == [0.5]  # nobody labelled one of them
    with pytest.raises(InputError, match=r"^rows: got 1 responses"):
        attribute_training_pairs(rows[-1:])


def test_the_loss_is_that_of_the_labelled_responses():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, 2, 6, generator=generator)
    labels = torch.randint(0, 5, (4, 2, 3), generator=generator).float()
    batch = PairBatch(states, states.sum(2), torch.ones(4), torch.zeros(4), "difference", {"attributes": labels})
    loss = AttributeLoss(6, ("x", "y", "z"), preference=0.5)
    outputs = loss.head.outputs(states.flatten(0, 1))
    whole = gaussian_nll(outputs[..., 0], outputs[..., 1], labels.flatten(0, 1))
    assert float(loss(batch).mean()) == pytest.approx(float(whole + 0.5 * bradley_terry(batch).mean()), rel=1e-6)
    labels[1:] = math.nan
    found = AttributeLoss(6, ("x", "y", "z"))(batch)
    found.sum().backward()
    assert found[1:].tolist() == [0, 0, 0]
    assert all(p.grad is None or p.grad.isfinite().all() for p in loss.parameters())
    for columns in ({}, {"attributes": labels[..., :2]}):
        with pytest.raises(InputError, match=r"^attributes"):
            loss(PairBatch(states, states.sum(2), torch.ones(4), torch.zeros(4), "difference", columns))
    with pytest.raises(InputError, match=r"^preference"):
        AttributeLoss(6, ("x",), preference=-1.0)


def test_two_stages_end_to_end(make_backbone, tmp_path):
    base = make_backbone("llama", model={"num_hidden_layers": 2})
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    draw = random.Random(0)
    rows = []
    for k in range(40):
        for _ in range(2):
            good, long = draw.random() < 0.5, draw.random() < 0.5
            text = f"a {'good' if good else 'bad'} answer{' and runs home and runs' if long else ''}"
            rows.append({"prompt": f"tell me {k}", "response": text, "helpful": 4.0 * good, "verbose": 4.0 * long})
    file = tmp_path / "labels.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    main = runpy.run_path(str(EXAMPLE))["main"]
    trainer = main([
        str(file), "--backbone", str(tmp_path / "base"), "--out", str(tmp_path / "body"), "--attributes",
        "helpful,verbose", "--epochs", "6", "--batch", "8", "--learning-rate", "3e-3", "--max-length", "64",
    ])  # fmt: skip
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    command = ["train", file, "--attributes", "helpful,verbose", "--steps", 60, "--label-range", "0,4"]
    command += ["--backbone", tmp_path / "body" / "backbone", "-o", tmp_path / "urm", "--device", "cpu"]
    command += ["--no-error-prior", "--embed-backbone"]
    result = CliRunner().invoke(app, [*map(str, command)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    model = RewardModel.from_pretrained(tmp_path / "urm", device="cpu", dtype=torch.float32)
    found = model.score("tell me 3", ["a good answer", "a bad answer"])
    assert float(found.preference[0, 1]) > 0.5
