"""On disk: a folder of one's own, and URM's published layout as the family reader sees it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.families import LAYOUTS

from rmcore import RewardModel
from rmcore._base.errors import CheckpointError, InputError
from rmcore.head.attributes import (
    URM_WEIGHTS,
    AttributeConfig,
    AttributeHead,
    GateConfig,
    load_attributes,
    read_published,
    save_attributes,
    write_published,
)

CHAT = [{"role": "user", "content": "what is the capital of France?"}]
RESPONSES = ["Paris is the capital of France.", "a dog"]


def heads(h: int) -> dict[str, AttributeHead]:
    return {
        "urm": AttributeHead(AttributeConfig(h, weights=URM_WEIGHTS), seed=1),
        "urm-gated": AttributeHead(AttributeConfig(h, gate=GateConfig()), seed=2),
    }


@pytest.mark.parametrize("family", ["urm", "urm-gated"])
def test_a_head_trained_here_is_the_published_family(family, tmp_path):
    tiny = LAYOUTS[family].make()
    base = tiny.write(tmp_path / "base")
    head = heads(int(tiny.config["hidden_size"]))[family]
    write_published(head, base, tmp_path / "out")
    model = RewardModel.from_pretrained(tmp_path / "out", device="cpu")
    assert model.backbone.config.family == family
    scored = model.score([CHAT], [RESPONSES])[0]
    ids = [LAYOUTS[family].ids(tiny, CHAT[0]["content"], response) for response in RESPONSES]
    with torch.no_grad():
        hidden = torch.stack([tiny.body(input_ids=torch.tensor([one])).last_hidden_state[0, -1] for one in ids])
    ours, theirs = head.scores(hidden), scored.attributes
    assert theirs is not None
    assert theirs.names == ours.names
    for name in ("attributes", "attribute_weights", "attribute_std", "aleatoric", "score_variance"):
        torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scored.scores.double(), head(hidden).detach().double(), rtol=1e-4, atol=1e-4)
    back = read_published(tmp_path / "out")
    assert torch.equal(back(hidden), head(hidden))
    assert not list((tmp_path / "out").glob("*.bin"))


def test_what_urms_layout_cannot_hold_is_refused(tmp_path):
    tiny = LAYOUTS["urm"].make()
    base, h = tiny.write(tmp_path / "base"), int(tiny.config["hidden_size"])
    wrong = {
        "normals": AttributeConfig(h, ("a", "b")),
        "quantiles": AttributeConfig(h, spread="quantiles"),
        "weights": AttributeConfig(h, weights=(1.0,) * 5),
        "softmax": AttributeConfig(h, gate=GateConfig("softmax")),
        "width": AttributeConfig(h + 1, gate=GateConfig()),
    }
    for message, config in wrong.items():
        with pytest.raises(InputError, match=message):
            write_published(AttributeHead(config), base, tmp_path / "out")
    with pytest.raises(CheckpointError):
        read_published(tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_ensemble_comes_back_as_it_was(tmp_path: Path):
    config = AttributeConfig(6, ("a", "b"), spread="quantiles", quantiles=3, gate=GateConfig("softmax", width=4))
    made = [AttributeHead(config, seed=seed) for seed in range(3)]
    save_attributes(made, tmp_path / "saved")
    back = load_attributes(tmp_path / "saved")
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert [head.config for head in back] == [config] * 3
    assert all(torch.equal(a(x), b(x)) for a, b in zip(made, back, strict=True))
    file = tmp_path / "saved" / "attributes.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="sha256"):
        load_attributes(tmp_path / "saved")
