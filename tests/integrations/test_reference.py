"""Preference over a reference policy: right by hand, no judge asked, rewards unchanged, and in TRL's logs."""

from __future__ import annotations

import asyncio
import json
import math

import pytest
import torch

from rmcore._base.errors import DataError, InputError
from rmcore.engine import RewardEngine
from rmcore.engine.routing import AlwaysRoute, BudgetRouter
from rmcore.integrations.reference import ReferenceAnswers, preference_over_reference
from rmcore.integrations.trl import PairwiseReward

PROMPTS = ["red tree", "blue river"]
RESPONSES = [["good clear", "bad vague", "right tree"], ["kind exact", "rude lazy"]]
REFERENCES = [("odd house",), ("helpful kind", "wrong")]


def by_hand(model, pairs):
    """Mean p̃ and win rate, one pair at a time."""
    engine = RewardEngine(model)
    values = [float(engine.score([p], [[a, b]])[0].preference[0, 1]) for p, a, b in pairs]
    return sum(values) / len(values), sum((v > 0) + 0.5 * (v == 0) for v in values) / len(values)


def over(engine, prompts, responses, references):
    return asyncio.run(preference_over_reference(engine, prompts, responses, references))


def test_every_response_is_compared_with_every_answer(reward_model):
    pairs = [
        (p, a, b)
        for p, own, answers in zip(PROMPTS, RESPONSES, REFERENCES, strict=True)
        for a in own
        for b in answers
    ]  # fmt: skip
    found = over(RewardEngine(reward_model), PROMPTS, RESPONSES, REFERENCES)
    preference, wins = by_hand(reward_model, pairs)
    assert found.preference == pytest.approx(preference, abs=2e-3)  # the head serves in half precision
    assert found.win_rate == pytest.approx(wins)
    assert found.share == 1.0


def test_in_concat_mode_too(make_backbone, preferences):
    from rmcore.model import RewardModel

    model, _ = RewardModel.fit(make_backbone("bert", pooling="mean"), preferences, mode="concat", num_features=32)
    pairs = [(PROMPTS[0], a, "odd house") for a in RESPONSES[0]]
    found = over(RewardEngine(model), PROMPTS, RESPONSES, [("odd house",), ()])
    preference, wins = by_hand(model, pairs)
    assert (found.preference, found.win_rate) == (pytest.approx(preference, abs=2e-3), pytest.approx(wins))
    assert found.share == 0.5


def test_the_same_text_is_neither_better_nor_worse(reward_model):
    found = over(RewardEngine(reward_model), ["red"], [["good", "good"]], [("good",)])
    assert (found.preference, found.win_rate, found.share) == (0.0, 0.5, 1.0)


def test_prompts_without_an_answer_lower_the_share(reward_model):
    found = over(RewardEngine(reward_model), PROMPTS, RESPONSES, [(), ("wrong",)])
    assert found.share == 0.5
    assert set(found.metrics()) == {"preference_over_reference", "win_rate_over_reference", "reference_share"}
    nothing = over(RewardEngine(reward_model), PROMPTS, RESPONSES, [(), ()])
    assert math.isnan(nothing.preference)
    assert nothing.metrics() == {"reference_share": 0.0}


def test_neither_judge_nor_router_nor_rewards_notice(reward_model, merit_judge):
    def run(**columns):
        judge = merit_judge()
        reward = PairwiseReward(RewardEngine(reward_model, judge, BudgetRouter(0.5)))
        logged = {}
        rewards = asyncio.run(
            reward(
                prompts=["red"] * 4, completions=["good", "bad", "kind", "odd"],
                log_metric=lambda name, value: logged.update({name: value}), **columns,
            )
        )  # fmt: skip
        return rewards, judge.asked, logged

    rewards, asked, logged = run(reference_completion=["vague tree"] * 4)
    plain, plain_asked, without = run()
    assert (rewards, asked) == (plain, plain_asked)
    assert asked > 0
    assert logged["rmcore/preference_over_reference"] > 0
    assert not any("reference" in name for name in without)


def test_only_every_so_often(reward_model):
    reward = PairwiseReward(RewardEngine(reward_model), reference_every=3)
    seen = []
    for _ in range(7):
        logged: dict[str, float] = {}
        call = reward(
            ["red"] * 2, ["good", "bad"], reference_completion=["odd"] * 2,
            log_metric=lambda name, value, logged=logged: logged.update({name: value}),
        )  # fmt: skip
        asyncio.run(call)
        seen.append("rmcore/win_rate_over_reference" in logged)
    assert seen == [True, False, False, True, False, False, True]


# -- where the answers are -------------------------------------------------------------------------------------------


def test_a_column_by_its_name_and_messages_in_it():
    message = [{"role": "assistant", "content": "odd"}]
    answers = ReferenceAnswers("mine").find(["red"] * 3, {"mine": ["good", None, message]})
    assert answers[0] == ("good",)
    assert answers[1] == ()
    assert len(answers[2]) == 1
    assert ReferenceAnswers().find(["red"], {"other": [1]}) is None


def test_a_function_is_asked_once_a_prompt():
    asked = []

    def answer(prompt):
        asked.append(prompt)
        return "odd" if prompt == "red" else None

    assert ReferenceAnswers(answer).find(["red", "red", "blue"], {}) == [("odd",), ("odd",), ()]
    assert asked == ["red", "blue"]


def test_a_file_of_groups(tmp_path):
    file = tmp_path / "reference.jsonl"
    file.write_text(json.dumps({"prompt": "red", "responses": ["odd", "bad"]}) + "\n")
    assert ReferenceAnswers(file).find(["red", "blue"], {}) == [("odd", "bad"), ()]
    file.write_text(file.read_text() * 2)
    assert ReferenceAnswers(file).find(["red"], {}) == [("odd", "bad")]
    file.write_text(file.read_text() + json.dumps({"prompt": "red", "responses": ["other"]}) + "\n")
    with pytest.raises(DataError, match=r"reference\.jsonl:3: the prompt of line 1 again, with other answers"):
        ReferenceAnswers(file).find(["red"], {})
    file.write_text("no json\n")
    with pytest.raises(DataError, match=r"reference\.jsonl"):
        ReferenceAnswers(file).find(["red"], {})


def test_what_is_no_reference_is_named(tmp_path):
    with pytest.raises(InputError, match="reference: got int"):
        ReferenceAnswers(3)
    with pytest.raises(InputError, match=r"reference: got .*none\.jsonl"):
        ReferenceAnswers(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"reference: got 'mine', expected a column of the data, which has \['a'\]"):
        ReferenceAnswers("mine").find(["red"], {"a": ["x"]})
    with pytest.raises(InputError, match=r"mine\[1\]"):
        ReferenceAnswers("mine").find(["red"] * 2, {"mine": ["x", 3]})
    with pytest.raises(InputError, match="mine: got 1 values, expected 2"):
        ReferenceAnswers("mine").find(["red"] * 2, {"mine": ["x"]})


# -- in the trainer --------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_chosen_by_it(policy_path, tokenizer_of, reward_model, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    args = trl.RLOOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=8, per_device_eval_batch_size=8, num_generations=4,
        max_completion_length=6, max_steps=4, logging_steps=1, save_steps=1, eval_steps=1, eval_strategy="steps",
        report_to=[], use_cpu=True, seed=3, beta=0.0, disable_tqdm=True, bf16=False, learning_rate=3e-3,
        metric_for_best_model="rmcore/preference_over_reference", greater_is_better=True, load_best_model_at_end=True,
    )  # fmt: skip
    rows = {"prompt": ["red tree", "blue river"] * 4, "prompt_id": list(range(8))}
    data = datasets.Dataset.from_dict({**rows, "reference_completion": ["odd house", "wrong"] * 4})
    trainer = trl.RLOOTrainer(
        model=str(policy_path("llama")), reward_funcs=PairwiseReward(RewardEngine(reward_model)), args=args,
        train_dataset=data, eval_dataset=data.select(range(2)), processing_class=tokenizer_of(),
    )  # fmt: skip
    trainer.train()
    name = "rmcore/preference_over_reference"
    trained = [entry[name] for entry in trainer.state.log_history if name in entry]
    evaluated = {e["step"]: e[f"eval_{name}"] for e in trainer.state.log_history if f"eval_{name}" in e}
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(trained) == len(evaluated) == 4
    assert max(abs(reward) for reward in rewards) < 1e-6 < min(abs(value) for value in trained)
    best = max(evaluated, key=evaluated.__getitem__)
    assert trainer.state.best_metric == pytest.approx(evaluated[best])
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")


def test_a_head_that_learned_is_the_one_that_compares(reward_model):
    engine = RewardEngine(reward_model, None)
    before = over(engine, PROMPTS, RESPONSES, REFERENCES)
    head = engine.model.head
    try:
        from rmcore.head import FrozenHead

        engine.model.head = FrozenHead(head.config, head.feature_map, -head.beta, head.beta0, head.posterior)
        after = over(engine, PROMPTS, RESPONSES, REFERENCES)
    finally:
        engine.model.head = head
    assert after.preference == pytest.approx(-before.preference)
    assert torch.equal(engine.head.beta, head.beta)


def test_no_pair_is_routed_by_an_engine_that_routes_all(reward_model, merit_judge):
    judge = merit_judge()
    over(RewardEngine(reward_model, judge, AlwaysRoute()), PROMPTS, RESPONSES, REFERENCES)
    assert judge.asked == 0
