"""Every family against its published description, and a planted fault of each refused by name."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.families import LAYOUTS, Tiny

from rmcore import Backbone, Preference, RewardModel
from rmcore._base.errors import CheckpointError
from rmcore.model.families.registry import FAMILIES

PROMPTS = ["what is the capital of France?", "tell me about the dog"]
RESPONSES = [
    ["Paris is the capital of France.", "a", "the quick brown fox jumps over the lazy dog and runs home"],
    ["a good answer is short", "it jumps over a fox"],
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    return {name: layout.make().write(root / name / layout.name) for name, layout in LAYOUTS.items()}


@pytest.fixture(scope="module")
def published(folders) -> Callable[[str], RewardModel]:
    """Each family's model as published, loaded once."""
    return functools.cache(lambda name: RewardModel.from_pretrained(folders[name], device="cpu"))


def as_prompts(layout, prompts):
    return prompts if layout.text else [[{"role": "user", "content": prompt}] for prompt in prompts]


def check_scores(layout, model):
    tiny = layout.make()
    expected = [[layout.reference(tiny, p, r) for r in group] for p, group in zip(PROMPTS, RESPONSES, strict=True)]
    assert max(map(max, expected)) - min(map(min, expected)) > 1e-2
    found = model.score(as_prompts(layout, PROMPTS), RESPONSES)
    for scores, reference in zip(found, expected, strict=True):
        wanted = torch.tensor(reference, dtype=torch.float64)
        torch.testing.assert_close(scores.scores, wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(scores.logit, wanted[:, None] - wanted, rtol=0, atol=2e-5)
        assert torch.equal(scores.uncertainty, torch.ones_like(scores.uncertainty))


@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_are_the_published_ones(published, name):
    model = published(name)
    assert model.backbone.config.family == name
    check_scores(LAYOUTS[name], model)


@pytest.mark.parametrize("name", ["armorm", "internlm2"])
def test_padded_rows_score_alike(folders, name):
    check_scores(LAYOUTS[name], RewardModel.from_pretrained(folders[name], device="cpu", packing="padded"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_planted_fault_is_refused_by_name(tmp_path, name):
    layout = LAYOUTS[name]
    tiny = layout.make()
    layout.fault(tiny)
    with pytest.raises(CheckpointError, match=layout.told):
        RewardModel.from_pretrained(tiny.write(tmp_path / layout.name), device="cpu")


def test_no_tensor_of_any_head_may_be_missing(tmp_path):
    """Whichever it is, it is named, and the body is not even read."""
    for name, layout in LAYOUTS.items():
        tiny = layout.make()
        inside = [tensor for tensor in tiny.tensors if not tensor.startswith(layout.prefix or "layers.")]
        inside = [tensor for tensor in inside if tensor in layout.head or tensor == "lm_head.weight"]
        for tensor in inside:
            if (
                tensor.startswith("normalizer.")
                or tensor.endswith("num_batches_tracked")
                or name in ("classifier", "trl-two-labels")
            ):
                continue  # the configuration has it too; nothing reads it; transformers' own class reads it
            spoilt = Tiny({k: v for k, v in tiny.tensors.items() if k != tensor}, tiny.config, tiny.tokenizer, None)
            with pytest.raises(CheckpointError, match=re.escape(f"'{tensor}'")):
                Backbone.from_reward_model(str(spoilt.write(tmp_path / layout.name)), device="cpu", family=name)


def upgraded(layout, model) -> tuple[RewardModel, list[Preference]]:
    words = ["dog", "fox", "answer", "model"]
    preferences = [
        Preference(prompt, f"a good {word} is quick", f"a bad {word} runs home")
        for word in words
        for prompt in as_prompts(layout, PROMPTS)
    ]
    return RewardModel.upgrade(model.backbone, preferences, dtype=torch.float32), preferences


@pytest.mark.parametrize("name", LAYOUTS)
def test_upgrading_keeps_the_scores_and_fits_a_posterior_around_them(published, name):
    layout, plain = LAYOUTS[name], published(name)
    model, preferences = upgraded(layout, plain)
    prompts = as_prompts(layout, PROMPTS)
    before, after = plain.score(prompts, RESPONSES), model.score(prompts, RESPONSES)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.scores, new.scores)
        torch.testing.assert_close(new.logit, old.logit, rtol=0, atol=2e-5)
        assert float(new.uncertainty[~torch.eye(len(new.uncertainty), dtype=torch.bool)].min()) > 1
    # v = Δᵀ P⁻¹ Δ with P = I + Σ p(1 − p) ΔΔᵀ over the preferences, of the rows the head serves
    rows = model.hidden_states([p.prompt for p in preferences], [[p.chosen, p.rejected] for p in preferences])
    weight, _ = plain.backbone.scalar_head()
    delta = (rows[0::2] - rows[1::2]).double()
    p = torch.sigmoid(delta @ weight.double())
    precision = torch.eye(rows.shape[1], dtype=torch.float64) + delta.mT @ ((p * (1 - p))[:, None] * delta)
    own = model.hidden_states(prompts[:1], RESPONSES[:1]).double()
    between = own[0] - own[1]
    expected = between @ torch.linalg.solve(precision, between)
    torch.testing.assert_close(after[0].variance[0, 1], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("classifier", "name"),
        ("armorm", "name"),
        *((n, "embed") for n in ("trl-two-labels", "armorm", "internlm2", "ldl")),
    ],
)
def test_an_upgraded_model_comes_back_from_its_folder(published, tmp_path, name, how):
    layout = LAYOUTS[name]
    model, _ = upgraded(layout, published(name))
    model.save_pretrained(tmp_path / "saved", backbone=how)
    again = RewardModel.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.backbone.config.family == name
    prompts = as_prompts(layout, PROMPTS)
    for one, other in zip(model.score(prompts, RESPONSES), again.score(prompts, RESPONSES), strict=True):
        torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-6)
        torch.testing.assert_close(one.variance, other.variance, rtol=1e-5, atol=1e-7)


def test_every_family_is_tested():
    elsewhere = {"cloud", "pairrm", "rlhflow-pair"}
    assert {family.name for family in FAMILIES} == set(LAYOUTS) | elsewhere
