"""What multi-attribute models say beside their score: means, weights, and the spread each family has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.families import LAYOUTS, Tiny
from torch import Tensor
from torch.nn import functional

from rmcore import Preference, RewardModel
from rmcore.head.attributes.scores import AttributeScores
from rmcore.model.families.head import RewardHead

ASKED = "what is the capital of France?"
CHAT = [{"role": "user", "content": ASKED}]
RESPONSES = ["Paris is the capital of France.", "a dog", "the quick brown fox jumps over the lazy dog"]
SPREAD = ("urm", "urm-gated", "qrm", "ldl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tiny, Path]]:
    made = {name: LAYOUTS[name].make() for name in (*SPREAD, "armorm", "inf-orm")}
    return {name: (tiny, tiny.write(tmp_path_factory.mktemp(name))) for name, tiny in made.items()}


@torch.no_grad()
def last_states(name: str, tiny: Tiny) -> Tensor:
    layout = LAYOUTS[name]
    ids = [layout.ids(tiny, ASKED, response) for response in RESPONSES]
    return torch.stack([tiny.body(input_ids=torch.tensor([one])).last_hidden_state[0, -1] for one in ids])


def found(folder: Path) -> tuple[AttributeScores, Tensor]:
    scores = RewardModel.from_pretrained(folder, device="cpu").score([CHAT], [RESPONSES])[0]
    assert scores.attributes is not None
    assert scores.scores is not None
    return scores.attributes, scores.scores


def close(ours: Tensor | None, theirs: Tensor) -> None:
    assert ours is not None
    torch.testing.assert_close(ours, theirs.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*SPREAD, "armorm"])
def test_a_score_is_the_weights_sum_of_the_means(folders, name):
    attributes, scores = found(folders[name][1])
    close((attributes.attributes * attributes.attribute_weights).sum(1), scores)
    assert len(attributes.names) == attributes.attributes.shape[1] == attributes.attribute_weights.shape[1]


@pytest.mark.parametrize("name", ["urm", "urm-gated"])
def test_a_normals_second_output_is_its_log_standard_deviation(folders, name):
    tiny, folder = folders[name]
    outputs = functional.linear(last_states(name, tiny), tiny.tensors["score.weight"]).view(-1, 5, 2)
    ours, _ = found(folder)
    assert ours.names == ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    close(ours.attributes, outputs[..., 0])
    close(ours.attribute_std, outputs[..., 1].exp())
    # The paper's Σ σ². Roundings of 2 ln σ in float32 are as large beside σ² as beside 1.
    torch.testing.assert_close(ours.aleatoric.double(), (2 * outputs[..., 1]).exp().sum(1).double(), rtol=2e-6, atol=0)
    draws = torch.Generator().manual_seed(0)
    assert ours.attribute_std is not None
    sampled = ours.attributes + ours.attribute_std * torch.randn(100_000, 3, 5, generator=draws, dtype=torch.float64)
    torch.testing.assert_close(
        (sampled * ours.attribute_weights).sum(2).var(0), ours.score_variance, rtol=0.03, atol=0.0
    )


def test_quantiles_are_weighed_like_their_means(folders):
    tiny, folder = folders["qrm"]
    ours, scores = found(folder)
    outputs = functional.linear(last_states("qrm", tiny), tiny.tensors["regression_layer.weight"]).view(3, 4, 3)
    close(ours.quantiles, outputs)
    assert ours.levels is not None
    assert ours.levels.tolist() == [0.25, 0.5, 0.75]
    assert ours.score_quantiles is not None
    close(ours.score_quantiles.mean(1), scores)
    close(ours.score_variance, ours.score_quantiles.var(1, correction=0))


def test_bins_are_a_mixture_whose_mean_is_the_score(folders):
    ours, scores = found(folders["ldl"][1])
    assert ours.bins is not None
    mixture = ours.score_probabilities
    assert mixture is not None
    close(mixture.sum(1), torch.ones(3))  # LDL's gate is a softmax here
    close(mixture @ ours.bins, scores)
    close(ours.score_variance, (mixture * (ours.bins - scores[:, None]).square()).sum(1))


def test_who_has_no_spread_says_none(folders):
    ours, _ = found(folders["armorm"][1])
    assert (ours.attribute_std, ours.quantiles, ours.probabilities, ours.aleatoric) == (None,) * 4
    assert ours.names[10] == "beavertails-is_safe"
    plain = RewardModel.from_pretrained(folders["inf-orm"][1], device="cpu")
    assert plain.score([CHAT], [RESPONSES])[0].attributes is None


def test_upgraded_padded_and_by_groups_they_stay(folders, tmp_path):
    """Groups have their own rows; an upgraded model, and one from a folder, keep what the published one says."""
    plain = RewardModel.from_pretrained(folders["urm-gated"][1], device="cpu", packing="padded")
    preferences = [Preference(CHAT, f"a good {word} is quick", f"a bad {word}") for word in ("dog", "fox")]
    model = RewardModel.upgrade(plain.backbone, preferences)
    model.save_pretrained(tmp_path / "saved", backbone="embed")
    again = RewardModel.from_pretrained(tmp_path / "saved", device="cpu")
    whole, _ = found(folders["urm-gated"][1])
    for one in (plain, model, again):
        first, second = one.score([CHAT, CHAT], [RESPONSES[:2], RESPONSES[2:]])
        for name in ("attributes", "attribute_weights", "attribute_std"):
            rows = torch.cat([getattr(group.attributes, name) for group in (first, second)])
            close(rows, getattr(whole, name))


def test_an_unread_response_has_none(folders):
    model = RewardModel.from_pretrained(folders["urm"][1], device="cpu", max_length=64, overlong="no-reward")
    scores = model.score([CHAT], [["a dog", "a fox " * 60]])[0]
    assert scores.attributes is not None
    assert scores.attributes.attributes.isnan().all(1).tolist() == [False, True]
    assert scores.attributes.aleatoric is not None
    assert scores.attributes.aleatoric.isnan().tolist() == [False, True]


def test_a_cache_of_states_keeps_the_gates_weights(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("RMCORE_CACHE", str(tmp_path))
    model = RewardModel.from_pretrained(folders["urm-gated"][1], device="cpu")
    model.backbone.use_state_cache()
    first, second = (model.score([CHAT], [RESPONSES])[0] for _ in range(2))
    assert model.backbone.stats.cached == 3
    assert first.attributes is not None
    assert second.attributes is not None
    assert torch.equal(first.attributes.attribute_weights, second.attributes.attribute_weights)


@pytest.mark.parametrize(("name", "how"), [("urm-gated", "_served"), ("armorm", "_served"), ("ldl", "_weights")])
def test_a_gate_is_computed_once_for_scores_and_attributes(folders, name, how, monkeypatch):
    """It is nearly all of such a head's work: two products as wide as the states, against ten outputs."""
    calls, compute = [], getattr(RewardHead, how)

    def counted(self: RewardHead, states: Tensor) -> object:
        calls.append(len(states))
        return compute(self, states)

    model = RewardModel.from_pretrained(folders[name][1], device="cpu")
    model.score([CHAT], [RESPONSES])  # the first call checks the encoding against rows one by one
    monkeypatch.setattr(RewardHead, how, counted)
    assert model.score([CHAT], [RESPONSES])[0].attributes is not None
    assert sum(calls) == len(RESPONSES)
