"""The trainer: exchanging a pair changes nothing, one power iteration a step, a kill costs no bit, one folder."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support.trained import HEAD, body_tensors, head_tensors, same

from rmcore._base.errors import InputError, NonFiniteError
from rmcore.head import SNGPHead
from rmcore.integrations.training import PairBatch, PairDataset, StreamedPairs, TrainingPair, bradley_terry
from rmcore.integrations.trl import PairwiseRewardTrainer
from rmcore.model import RewardModel


def turned(pairs):
    return [TrainingPair(p.prompt, p.rejected, p.chosen, 1 - p.label, -p.margin, p.weight) for p in pairs]


# -- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["difference", "concat"])
def test_exchanging_the_responses_of_a_pair_changes_nothing(mode, backbone_of, config_of, preferences):
    """Through the model: soft labels, margins and weights, loss and the gradient of β."""
    pairs = [
        TrainingPair(p.prompt, p.chosen, p.rejected, label, margin, weight)
        for p, label, margin, weight in zip(
            preferences[:4], (1.0, 0.8, 0.5, 0.65), (0.0, 0.5, 1.0, 0.2), (1, 2, 0.5, 1), strict=True
        )
    ]
    args = config_of(center_rewards_coefficient=0.1)
    trainer = PairwiseRewardTrainer(
        backbone_of(), args, head={**HEAD, "mode": mode, "layer_size": 8}, train_dataset=pairs
    )
    trainer.head.set_length_scale(trainer.rows(trainer.model).states.flatten(0, 1))
    torch.nn.init.normal_(trainer.head.beta, generator=torch.Generator().manual_seed(1))
    found = []
    for given in (pairs, turned(pairs)):
        data = PairDataset(trainer.backbone, given, mode)
        trainer.head.zero_grad()
        loss = trainer.compute_loss(trainer.model, trainer.data_collator([data[k] for k in range(4)]))
        loss.backward()
        found.append((loss.detach(), trainer.head.beta.grad.clone()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_the_loss_of_a_pair_by_hand():
    scores = torch.tensor([[2.0, 0.5], [0.1, 0.3]])
    labels, margins = torch.tensor([0.8, 0.5]), torch.tensor([0.5, 0.0])

    def nats(g, y):
        return -(y * math.log(1 / (1 + math.exp(-g))) + (1 - y) * math.log(1 / (1 + math.exp(g))))

    batch = PairBatch(torch.zeros(2, 2, 3), scores, labels, margins, "difference", {})
    assert bradley_terry(batch).tolist() == pytest.approx([nats(1.0, 0.8), nats(-0.2, 0.5)])
    both = PairBatch(torch.zeros(2, 2, 3), scores, labels, margins, "concat", {})
    by_hand = [(nats(1.5, 0.8) + nats(1.0, 0.2)) / 2, (nats(0.1, 0.5) + nats(0.3, 0.5)) / 2]
    assert bradley_terry(both).tolist() == pytest.approx(by_hand)
    assert both.logits.tolist() == pytest.approx([0.75, -0.1])


def test_a_weight_of_two_is_the_pair_twice_and_none_is_no_pair(backbone_of, config_of, preferences):
    p, q, r = preferences[:3]
    trainer = PairwiseRewardTrainer(backbone_of(), config_of(), head=HEAD, train_dataset=preferences)
    trainer.head.set_length_scale(trainer.rows(trainer.model).states.flatten(0, 1))
    torch.nn.init.normal_(trainer.head.beta, generator=torch.Generator().manual_seed(1))
    trainer.model.train()
    weighed = [TrainingPair(p.prompt, p.chosen, p.rejected, weight=2.0), q]
    weighed.append(TrainingPair(r.prompt, r.chosen, r.rejected, weight=0.0))
    sums = []
    for pairs in (weighed, [p, p, q]):
        data = PairDataset(trainer.backbone, pairs, "difference")
        batch = trainer.data_collator([data[k] for k in range(3)])
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=1)
        loss.backward()
        gradient = trainer.model.layers[1].mlp.down_proj.weight.grad.clone()
        sums.append((loss.detach(), gradient))
    assert float(sums[0][1].abs().max()) > 1e-4
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-4, atol=1e-6)


def test_power_iteration_goes_one_step_an_optimiser_step(backbone_of, config_of, preferences, monkeypatch):
    calls = []
    step = SNGPHead.step_power_iteration
    monkeypatch.setattr(SNGPHead, "step_power_iteration", lambda self, n=1: (calls.append(n), step(self, n))[1])
    args = config_of(max_steps=3, gradient_accumulation_steps=2, posterior="none")
    trainer = PairwiseRewardTrainer(backbone_of(), args, head={**HEAD, "layer_size": 8}, train_dataset=preferences)
    before = trainer.head.weight.detach().clone()
    trainer.train()
    assert calls == [100, 1, 1, 1]
    assert not torch.equal(trainer.head.weight, before)
    norm = torch.linalg.matrix_norm(trainer.head.normalized_weight().detach().double(), 2)
    assert float(norm) <= 0.95 * 1.05


def test_a_loss_may_have_parameters_and_columns_of_its_own(backbone_of, config_of, preferences):
    class Regression(torch.nn.Module):
        """Attribute means beside the preference."""

        def __init__(self):
            super().__init__()
            self.means = torch.nn.Linear(32, 2)

        def forward(self, batch):
            return bradley_terry(batch) + (self.means(batch.states) - batch.columns["marks"]).square().mean((1, 2))

    pairs = [
        TrainingPair(p.prompt, p.chosen, p.rejected, columns={"marks": [[1.0, 0.5], [-1.0, 0.0]]}) for p in preferences
    ]
    loss = Regression()
    before = loss.means.weight.detach().clone()
    args = config_of(save_strategy="steps", save_steps=4, posterior="none")
    trainer = PairwiseRewardTrainer(backbone_of(), args, head=HEAD, train_dataset=pairs, loss=loss)
    trainer.train()
    assert not torch.equal(loss.means.weight, before)
    after = loss.means.weight.detach().clone()
    torch.nn.init.zeros_(loss.means.weight)
    trainer._replicated.load(f"{args.output_dir}/checkpoint-4")
    assert torch.equal(loss.means.weight, after)


# -- evaluation, logs, the best --------------------------------------------------------------------------------------


def test_evaluation_logs_and_the_best_checkpoint(backbone_of, config_of, preferences, held_out, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "logs"
    args = config_of(
        max_steps=-1, num_train_epochs=3, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="log_loss", greater_is_better=False, report_to=["tensorboard"],
        posterior_at_evaluation=True, posterior_pairs=10, head_learning_rate=0.2, save_total_limit=3,
    )  # fmt: skip
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(logs))
    trainer = PairwiseRewardTrainer(
        backbone_of(), args, head=HEAD, train_dataset=preferences, eval_dataset=held_out,
        compute_metrics=lambda found: {"mean_logit": float(found.predictions.mean())},
    )  # fmt: skip
    trainer.train()
    events = EventAccumulator(str(next(logs.rglob("events.*")).parent)).Reload()
    names = set(events.Tags()["scalars"])
    wanted = ("loss", "accuracy", "log_loss", "ece", "log_loss_u", "ece_u", "auroc_u", "mean_logit")
    assert {f"eval/{name}" for name in wanted} <= names
    losses = [event.value for event in events.Scalars("eval/log_loss")]
    assert len(losses) == 3
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 19))
    best = trainer.state.best_global_step
    assert best == 6 * (1 + losses.index(min(losses)))
    # head and backbone are those of the best checkpoint, and the posterior is fitted on them
    again = trainer.evaluate()
    assert {"eval_log_loss_u", "eval_auroc_u"} <= set(again)
    from safetensors.torch import load_file

    weights = load_file(f"{args.output_dir}/checkpoint-{best}/model.safetensors")
    assert same({name: t for name, t in body_tensors(trainer).items() if name in weights}, weights)
    assert trainer.frozen.posterior.count == len(preferences)


# -- the model's folder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["difference", "concat"])
def test_save_model_writes_what_from_pretrained_opens(mode, backbone_of, config_of, preferences, tmp_path):
    head = {**HEAD, "mode": mode, "layer_size": 8}
    trainer = PairwiseRewardTrainer(backbone_of(), config_of(), head=head, train_dataset=preferences)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    loaded = RewardModel.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float32)
    p = preferences[0]
    ours = RewardModel(trainer.backbone, trainer.frozen).score(p.prompt, [p.chosen, p.rejected])
    theirs = loaded.score(p.prompt, [p.chosen, p.rejected])
    torch.testing.assert_close(theirs.preference, ours.preference)
    torch.testing.assert_close(theirs.uncertainty, ours.uncertainty)
    assert float(theirs.uncertainty[0, 1]) > 1


def test_adapters_alone_are_trained_saved_and_loaded(backbone_of, config_of, preferences, tmp_path):
    peft = pytest.importorskip("peft")
    base = backbone_of()
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    args = config_of(save_strategy="steps", save_steps=2)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])

    def make():
        return PairwiseRewardTrainer(
            str(tmp_path / "base"), args, head={**HEAD, "layer_size": 8}, train_dataset=preferences, peft_config=lora
        )

    trainer = make()
    assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == {
        n for n, _ in trainer.model.named_parameters() if "lora_" in n
    }
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists()
    trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model" / "backbone" / "model.safetensors").exists()
    told = json.loads((tmp_path / "model" / "backbone" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(tmp_path / "base")
    loaded = RewardModel.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float32)
    p = preferences[0]
    ours = RewardModel(trainer.backbone, trainer.frozen).score(p.prompt, [p.chosen, p.rejected])
    torch.testing.assert_close(loaded.score(p.prompt, [p.chosen, p.rejected]).preference, ours.preference)
    # and from the second step on to the same bits
    resumed = make()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(body_tensors(trainer), body_tensors(resumed))
    assert same(head_tensors(trainer), head_tensors(resumed))


# -- other ways to hold the data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["last", "mean", "first"])
def test_without_padding_states_are_the_same(pooling, backbone_of, config_of, preferences):
    states = []
    for free in (False, True):
        args = config_of(padding_free=free)
        backbone = backbone_of(pooling=pooling, length_feature=0.5)
        trainer = PairwiseRewardTrainer(backbone, args, head=HEAD, train_dataset=preferences[:6])
        states.append(trainer.rows(trainer.model).states)
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)


def test_a_stream_is_trained_on(backbone_of, config_of, preferences):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in preferences]
    rows[1]["rejected"] = rows[1]["chosen"]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    args = config_of(max_steps=7)
    trainer = PairwiseRewardTrainer(backbone_of(), args, head=HEAD, train_dataset=stream)
    assert isinstance(trainer.train_dataset, StreamedPairs)
    trainer.train()
    assert trainer.train_dataset.dropped >= 1
    assert trainer.frozen.posterior.count > 0


def test_a_data_set_with_margins_and_weights(backbone_of, config_of, preferences):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected, "margin": 0.5, "weight": 2.0}
        for p in preferences[:4]
    ]
    trainer = PairwiseRewardTrainer(
        backbone_of(), config_of(), head=HEAD, train_dataset=datasets.Dataset.from_list(rows)
    )
    batch = trainer.data_collator([trainer.train_dataset[k] for k in range(4)])
    assert batch["margins"].tolist() == [0.5] * 4
    assert batch["weights"].tolist() == [2.0] * 4


# -- arithmetic ------------------------------------------------------------------------------------------------------


def test_bf16_and_activation_checkpointing_leave_the_head_in_float32(backbone_of, config_of, preferences):
    found = {}
    for name, settings in {
        "plain": {},
        "checkpointed": {"gradient_checkpointing": True},
        "bf16": {"bf16": True},
    }.items():
        trainer = PairwiseRewardTrainer(
            backbone_of(), config_of(posterior="none", **settings), head=HEAD, train_dataset=preferences
        )
        trainer.train()
        assert trainer.head.beta.dtype == torch.float32
        found[name] = trainer.state.log_history[2]["loss"]
    assert found["checkpointed"] == pytest.approx(found["plain"], rel=1e-5)
    assert found["bf16"] == pytest.approx(found["plain"], rel=0.05)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"fp16": True}, "fp16"),
        ({"posterior": "later"}, "posterior"),
        ({"covariance_momentum": 0.9}, "covariance_momentum: got 0.9, expected None. An exponential average forgets"),
        ({"head_learning_rate": 0.0}, "head_learning_rate"),
        ({"head_weight_decay": -1.0}, "head_weight_decay"),
        ({"center_rewards_coefficient": math.nan}, "center_rewards_coefficient"),
        ({"posterior_pairs": 0}, "posterior_pairs"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, name, config_of):
    with pytest.raises(InputError, match=f"^{name}"):
        config_of(**settings)


def test_sharding_that_does_not_happen_is_refused(backbone_of, config_of, preferences, monkeypatch):
    """accelerate keeps the whole model on each process where it finds no accelerator."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"^fsdp: got it on CPUs, where accelerate \d.* leaves the model whole"):
        PairwiseRewardTrainer(backbone_of(), config_of(), head=HEAD, train_dataset=preferences)


def test_batches_cut_by_the_main_process_are_refused(config_of):
    """It would cut texts, of which a pair has two, and pairs at one place."""
    with pytest.raises(InputError, match=r"^accelerator_config\.dispatch_batches: got True"):
        config_of(accelerator_config={"dispatch_batches": True})


def test_push_to_hub_pushes_what_from_pretrained_opens(backbone_of, config_of, preferences, fake_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    args = config_of(hub_model_id="me/mine", push_to_hub=True, save_strategy="steps", save_steps=2)
    trainer = PairwiseRewardTrainer(backbone_of(), args, head=HEAD, train_dataset=preferences)
    trainer.train()
    assert not fake_hub.repos["me/mine"].refs or "model.safetensors" not in fake_hub.repos["me/mine"].files()
    trainer.save_model()
    files = set(fake_hub.repos["me/mine"].files())
    assert {"rmcore.json", "backbone/model.safetensors", "README.md"} <= files
    assert "model.safetensors" not in files
    with pytest.raises(InputError, match=r"^token"):
        trainer.push_to_hub(token="hf_secret")


def test_a_run_that_diverges_is_stopped_before_the_weights_take_it(backbone_of, config_of, preferences):
    trainer = PairwiseRewardTrainer(
        backbone_of(), config_of(learning_rate=1e30, max_steps=20), head=HEAD, train_dataset=preferences
    )
    with pytest.raises(NonFiniteError, match="Lower the learning rate"):
        trainer.train()
    assert not trainer.backbone.model.training


def test_margins_and_weights_are_checked(backbone_of, config_of, preferences):
    p = preferences[0]
    for name, values in {"weight": (-1.0, math.nan, "2"), "margin": (math.inf, True)}.items():
        for value in values:
            with pytest.raises(InputError, match=rf"^preferences\[0\]\.{name}"):
                PairDataset(
                    backbone_of(), [TrainingPair(p.prompt, p.chosen, p.rejected, **{name: value})], "difference"
                )


def test_what_no_gradient_reaches_is_frozen(backbone_of, config_of, preferences):
    backbone = backbone_of("bert", pooling="mean", layer=1)
    PairwiseRewardTrainer(backbone, config_of(), head=HEAD, train_dataset=preferences)
    frozen = {name.split(".")[0] + "." + name.split(".")[2] if "layer" in name else name.split(".")[0]
              for name, p in backbone.model.named_parameters() if not p.requires_grad}  # fmt: skip
    assert frozen == {"pooler", "encoder.1"}
