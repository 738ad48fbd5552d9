"""Training behind critiques: CLoud's first stage and its joint one, on a small decoder with LoRA and without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rmcore._base.errors import InputError
from rmcore.engine.own_critic import OwnCritic
from rmcore.model import RewardModel
from rmcore.model.backbone import Backbone
from rmcore.model.critiques import critique_lead
from rmcore.model.language_model import language_model

pytest.importorskip("accelerate", reason="accelerate is not installed (pip install 'rmcore[train]')")

from rmcore.integrations.training import PairDataset, PairwiseRewardTrainer
from rmcore.integrations.training.collator import PairCollator

HEAD = {"num_features": 64, "kernel_scale": 3.0}
GOOD, BAD = "it is right and polite", "it is wrong, for it is rude"


@pytest.fixture
def critiqued(preferences):
    """Two critiques of each chosen response, one of each rejected one; a last pair without any."""
    said = [replace(p, critiques=((GOOD, "yes, it is right"), (BAD,))) for p in preferences[:8]]
    return [*said, preferences[8]]


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


def own_nll(model, ids, start):
    """transformers' own loss of the tokens from ``start`` on."""
    given = torch.tensor([ids])
    labels = given.clone()
    labels[0, :start] = -100
    with torch.no_grad():
        return float(model(given, labels=labels).loss)


def test_rows_say_where_a_critique_begins_and_weigh_what_their_pair_does(backbone_of, critiqued):
    backbone = backbone_of("qwen2")
    data = PairDataset(backbone, critiqued, "difference", critiques=True)
    assert len(data) == 8 * 2 + 1
    assert [data[k]["weight"] for k in (0, 1, 16)] == [0.5, 0.5, 1.0]
    lead = critique_lead(backbone.encoder, critiqued[0].prompt, critiqued[0].chosen)
    row = data[1]
    assert row["critique"][0] == len(lead)
    assert tuple(row["ids"][0][: len(lead)].tolist()) == lead
    assert "yes, it is right" in backbone.tokenizer.decode(row["ids"][0][len(lead) :])
    assert data[16]["critique"] == [len(ids) for ids in data[16]["ids"]], "nothing to learn from an empty critique"
    padded = PairCollator(backbone)([data[k] for k in range(3)])
    packed = PairCollator(backbone, "padding-free")([data[k] for k in range(3)])
    for batch in (padded, packed):
        assert batch["critique"].shape == batch["input_ids"].shape
        assert int(batch["critique"].sum()) == sum(
            len(ids) - start for k in range(3) for ids, start in zip(data[k]["ids"], data[k]["critique"], strict=True)
        )
    with pytest.raises(InputError, match="difference mode"):
        PairDataset(backbone, critiqued, "concat", critiques=True)


@pytest.mark.parametrize("tied", [True, False])
def test_the_language_model_is_transformers_own_on_the_same_body(tied, backbone_of, tmp_path):
    import transformers

    backbone = backbone_of("llama", model={"tie_word_embeddings": tied})
    whole = transformers.LlamaForCausalLM(backbone.model.config)
    whole.model.load_state_dict(backbone.model.state_dict())
    whole.tie_weights()
    whole.save_pretrained(tmp_path / "lm")
    backbone.tokenizer.save_pretrained(tmp_path / "lm")
    loaded = Backbone.from_pretrained(str(tmp_path / "lm"), device="cpu", pooling="last")
    found = language_model(loaded)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, whole.eval()(ids).logits)
    assert found.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= 7
    assert found.model is loaded.model
    # A folder of rmcore's keeps the output weights, so that the model goes on writing.
    RewardModel.fit(loaded, _pairs(), num_features=16)[0].save_pretrained(tmp_path / "rm", backbone="embed")
    again = RewardModel.from_pretrained(tmp_path / "rm", device="cpu").backbone
    with torch.no_grad():
        torch.testing.assert_close(language_model(again)(ids).logits, whole(ids).logits)
    if not tied:
        with pytest.raises(InputError, match="without a name"):
            language_model(backbone)


def _pairs():
    from rmcore.model import Preference

    return [Preference("tell me", f"a good answer {k}", f"a bad one {k}") for k in range(3)]


@pytest.mark.parametrize(("adapters", "padding_free"), [(True, False), (True, True), (False, False)])
def test_the_first_stage_teaches_critiques_and_writes_a_language_model(
    adapters, padding_free, backbone_of, config_of, critiqued, tmp_path
):
    import transformers

    backbone = backbone_of("qwen2", model={"tie_word_embeddings": True})
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    args = config_of(
        critiques=True, critique_sft=True, max_steps=12, learning_rate=1e-1 if adapters else 1e-2,
        padding_free=padding_free, eval_strategy="steps", eval_steps=12,
    )  # fmt: skip
    trainer = PairwiseRewardTrainer(
        backbone, args, train_dataset=critiqued, eval_dataset=critiqued[:2], peft_config=lora() if adapters else None
    )
    lead = critique_lead(backbone.encoder, critiqued[0].prompt, critiqued[0].chosen)
    text = backbone.encoder.encode(critiqued[0].prompt, critiqued[0].chosen, critique=GOOD).ids
    untrained = own_nll(language_model(backbone), text, len(lead))
    trainer.train()
    told = [row["critique_nll"] for row in trainer.state.log_history if "critique_nll" in row]
    assert len(told) == 12
    assert told[-1] < told[0] - 0.1, "as far as random embeddings let it"
    (evaluated,) = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert evaluated["eval_critique_nll"] < told[0]
    assert "eval_accuracy" not in evaluated, "nothing of a reward was trained"
    trainer.save_model(str(tmp_path / "lm"))
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm").eval()
    assert not any("lora" in name for name, _ in written.named_parameters())
    found = own_nll(written, text, len(lead))
    assert found == pytest.approx(own_nll(language_model(backbone), text, len(lead)), abs=1e-4), "adapters are merged"
    assert found < untrained - 0.1
    if adapters:  # the model underneath is what it was
        after = backbone.model.get_base_model().state_dict()
        assert torch.equal(
            before["layers.0.self_attn.q_proj.weight"], after["layers.0.self_attn.q_proj.base_layer.weight"]
        )
    own = Backbone.from_pretrained(str(tmp_path / "lm"), device="cpu", pooling="last")
    said = OwnCritic(language_model(own), own.encoder, max_new_tokens=8, temperature=0).critique("tell me", "a fox")
    assert said[0].text or said[0].reason
    with pytest.raises(InputError, match="first stage"):
        _ = trainer.reward_model


def test_the_joint_stage_trains_reward_and_critiques_and_serves_behind_them(
    backbone_of, config_of, critiqued, tmp_path
):
    critiqued = [replace(item, critiques=((GOOD,), (BAD,))) for item in critiqued[:8]]
    backbone_of("qwen2", model={"tie_word_embeddings": True}).save(tmp_path / "base")
    backbone = Backbone.from_pretrained(str(tmp_path / "base"), device="cpu", pooling="last")
    args = config_of(critiques=True, lm_weight=1.25, max_steps=12, learning_rate=1e-1)
    trainer = PairwiseRewardTrainer(backbone, args, head=HEAD, train_dataset=critiqued, peft_config=lora())
    trainer.train()
    rows = [row for row in trainer.state.log_history if "critique_nll" in row]
    assert rows[0]["loss"] == pytest.approx(0.6931 + 1.25 * rows[0]["critique_nll"], rel=1e-3)
    assert rows[-1]["critique_nll"] < rows[0]["critique_nll"] - 0.03
    trainer.save_model(str(tmp_path / "model"))
    model = RewardModel.from_pretrained(tmp_path / "model", device="cpu")
    item = critiqued[0]
    found = model.score(item.prompt, [item.chosen, item.rejected], critiques=[list(own) for own in item.critiques])
    assert float(found.preference[0, 1]) > 0
    told = language_model(model.backbone)  # with its adapters
    text = model.backbone.encoder.encode(item.prompt, item.chosen, critique=GOOD).ids
    start = len(critique_lead(model.backbone.encoder, item.prompt, item.chosen))
    assert own_nll(told, text, start) == pytest.approx(own_nll(language_model(backbone), text, start), abs=1e-3)


def test_padding_changes_no_token_loss(backbone_of, config_of, critiqued):
    found = []
    for padding_free in (False, True):
        backbone = backbone_of("qwen2", model={"tie_word_embeddings": True})
        args = config_of(critiques=True, lm_weight=1.0, padding_free=padding_free)
        trainer = PairwiseRewardTrainer(backbone, args, head=HEAD, train_dataset=critiqued)
        data = trainer.train_dataset
        batch = trainer.data_collator([data[k] for k in (0, 1, 16)])
        found.append(trainer._tokens.nll(trainer.batch_states.tokens(trainer.model, batch), batch, training=False))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert found[0][2].tolist() == [0, 0]
    assert bool((found[0][:2] > 0).all())


def test_what_cannot_be(backbone_of, config_of, critiqued, preferences):
    with pytest.raises(InputError, match="critiques: got False"):
        config_of(lm_weight=1.0)
    with pytest.raises(InputError, match="lm_weight"):
        config_of(critiques=True, critique_sft=True, lm_weight=1.0)
    args = config_of(critiques=True, critique_sft=True)
    with pytest.raises(InputError, match="preferences without any"):
        PairwiseRewardTrainer(backbone_of("qwen2"), args, train_dataset=preferences)
    tied = {"tie_word_embeddings": True}
    for config, says in (({"layer": 1, "model": tied}, "layer 1"), ({}, "without a name")):
        with pytest.raises(InputError, match=says):
            PairwiseRewardTrainer(backbone_of("qwen2", **config), args, train_dataset=critiqued)
    with pytest.raises(InputError, match="a decoder's body"):
        PairwiseRewardTrainer(backbone_of("bert", pooling="mean"), args, train_dataset=critiqued)
    with pytest.raises(InputError, match="one beside"):
        PairwiseRewardTrainer(backbone_of("qwen2"), args, train_dataset=critiqued, loss=lambda batch: batch.labels)
