"""RLOO with TRL on a CPU in under two minutes: a tiny policy learns what an uncertainty-aware reward model likes.

    python examples/trl_rloo.py [--steps 60] [--out out/trl_rloo]

Everything is made on the spot: a vocabulary of forty words, a random policy, a pairwise reward model fitted on sixty
preferences (kind words are better), and a judge behind real HTTP on this machine that counts kind and unkind words.
Each step the pairs the reward model is least sure of go to the judge. Printed: the trainer's advantages beside
``GroupScores.advantages``. Drawn: the policy's mean preference over its own start, and u, over steps.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from rmcore import BudgetRouter, RewardEngine, RewardModel
from rmcore.engine.groups import GroupScores
from rmcore.integrations.trl import PairwiseReward, check_trl_config
from rmcore.judge import ChatJudge, ClientOptions, RecordedJudge, ReplayServer
from rmcore.judge.base import Verdict
from rmcore.model import Preference
from rmcore.model.backbone import Backbone, BackboneConfig

KIND = ["good", "clear", "right", "exact", "helpful", "kind", "true", "warm", "fair", "wise"]
UNKIND = ["bad", "vague", "wrong", "rude", "lazy", "odd", "false", "cold", "mean", "dull"]
NEUTRAL = ["red", "blue", "green", "tree", "house", "river", "stone", "cloud", "road", "field", "door", "lamp", "chair"]
WORDS = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", *KIND, *UNKIND, *NEUTRAL]


class CountingJudge(RecordedJudge):
    """Instead of a recorded verdict: the response with more kind and fewer unkind words wins."""

    def lookup(self, prompt: object, first: str, second: str) -> Verdict:
        difference = merit(first) - merit(second)
        return Verdict.of("win" if difference > 0 else "loss" if difference < 0 else "tie")


def merit(text: str) -> int:
    return sum((word in KIND) - (word in UNKIND) for word in text.split())


def make_tokenizer() -> Any:
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)


def make_reward_model(rng: random.Random) -> RewardModel:
    """An encoder with random weights, mean-pooled, under a fitted SNGP head."""
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    encoder = transformers.BertModel(config).eval()
    backbone = Backbone(encoder, make_tokenizer(), BackboneConfig(pooling="mean", append_eos=False))
    # Only the first half of each list occurs in the preferences, so that the rest is news to the head.
    preferences = [
        Preference(
            " ".join(rng.choices(NEUTRAL, k=3)),
            " ".join(rng.choices(KIND[:5], k=3) + rng.choices(NEUTRAL, k=3)),
            " ".join(rng.choices(UNKIND[:5], k=3) + rng.choices(NEUTRAL, k=3)),
        )
        for _ in range(60)
    ]
    model, _ = RewardModel.fit(backbone, preferences, mode="difference", num_features=256, kernel_scale=3.0)
    return model


def make_policy(folder: Path) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: list[str], seed: int) -> list[str]:
    torch.manual_seed(seed)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    out = model.generate(**inputs, do_sample=True, max_new_tokens=8, pad_token_id=0)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def run(steps: int, out: Path, *, seed: int = 0) -> dict[str, Any]:
    """Train, print, draw; returns the curves and the worst difference between the trainer's advantages and ours."""
    import datasets
    from trl import RLOOConfig, RLOOTrainer

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer, reward_model = make_tokenizer(), make_reward_model(rng)
    prompts = [" ".join(rng.choices(NEUTRAL, k=3)) for _ in range(64)]
    held_out = [" ".join(rng.choices(NEUTRAL, k=3)) for _ in range(64)]
    steps_seen: list[Mapping[str, Any]] = []
    worst = 0.0

    with ReplayServer(CountingJudge({})) as server, tempfile.TemporaryDirectory() as folder:
        judge = ChatJudge(server.base_url, "counting", api_key_env=None, client=ClientOptions(concurrency=8))
        reward = PairwiseReward(RewardEngine(reward_model, judge, BudgetRouter(0.2)))
        args = RLOOConfig(
            output_dir=folder, per_device_train_batch_size=32, num_generations=8, max_completion_length=8,
            max_steps=steps, learning_rate=3e-3, beta=0.0, report_to=[], save_strategy="no", use_cpu=True, bf16=False,
            disable_tqdm=True, logging_strategy="no", seed=seed, lr_scheduler_type="constant",
            # One response a held-out prompt: it is compared with the policy's first answer, by the reward model alone.
            eval_strategy="steps", eval_steps=5, eval_on_start=True, num_generations_eval=1,
            per_device_eval_batch_size=64,
        )  # fmt: skip
        for issue in check_trl_config(args):
            print("not exact:", issue)
        data = datasets.Dataset.from_dict({"prompt": prompts, "prompt_id": list(range(len(prompts)))})
        policy = make_policy(Path(folder) / "policy")
        start = sample(transformers.LlamaForCausalLM.from_pretrained(policy), tokenizer, held_out, seed)
        held = {"prompt": held_out, "prompt_id": list(range(len(held_out))), "reference_completion": start}
        trainer = RLOOTrainer(
            model=str(policy), reward_funcs=reward, args=args, train_dataset=data,
            eval_dataset=datasets.Dataset.from_dict(held), processing_class=tokenizer,
        )  # fmt: skip
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        generate = trainer._generate_and_score_completions

        def watched(inputs: Any) -> Any:
            nonlocal worst
            result = generate(inputs)
            if not trainer.model.training:
                return result
            scores = reward.last
            assert isinstance(scores, GroupScores)
            worst = max(worst, float((result["advantages"].double() - scores.advantages).abs().max()))
            if not steps_seen:
                print("the first group's advantages, from the trainer and from rmcore:")
                print("  ", [round(a, 4) for a in result["advantages"][:8].tolist()])
                print("  ", [round(a, 4) for a in scores.advantages[:8].tolist()])
            steps_seen.append(scores.summary())
            return result

        trainer._generate_and_score_completions = watched
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        name = "eval_rmcore/preference_over_reference"
        curve = [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]
        judge.close()

    judged = sum(summary["decided_by"]["judge"] for summary in steps_seen)
    pairs = sum(summary["pairs"] for summary in steps_seen)
    print(f"{steps} steps in {seconds:.0f} s; the judge decided {judged} of {pairs} pairs over HTTP")
    print(f"largest difference between the trainer's advantages and GroupScores.advantages: {worst:.1e}")
    print(f"mean preference over the start: {curve[0][1]:+.2f} -> {curve[-1][1]:+.2f}")
    print("a response then:", repr(start[0]), "| now:", repr(sample(trainer.model, tokenizer, held_out[:1], seed)[0]))
    result = {
        "preference": curve,
        "uncertainty": [summary["uncertainty"]["mean"] for summary in steps_seen],
        "uncertainty_p90": [summary["uncertainty"]["p90"] for summary in steps_seen],
        "worst_difference": worst,
        "seconds": seconds,
        "judged": judged,
        "pairs": pairs,
    }
    draw(result, out)
    return result


def draw(result: Mapping[str, Any], out: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'rmcore[plots]')")
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(*zip(*result["preference"], strict=True), marker="o", markersize=3, color="tab:blue")
    left.axhline(0, color="0.7", linewidth=0.8)
    left.set(title="Preference over the policy's own start", xlabel="RLOO step", ylabel="mean p̃ (logits)")
    right.plot(result["uncertainty"], color="tab:orange", label="mean")
    right.plot(result["uncertainty_p90"], color="tab:orange", alpha=0.4, label="90% quantile")
    right.set(title="Uncertainty of the policy's pairs", xlabel="RLOO step", ylabel="u")
    right.legend(frameon=False)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "trl_rloo.png", dpi=130)
    plt.close(figure)
    print(f"wrote {out / 'trl_rloo.png'}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/trl_rloo"))
    options = parser.parse_args()
    run(options.steps, options.out, seed=options.seed)
