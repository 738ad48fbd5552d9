"""One rank of two-rank RLOO runs, one after the other; started under torchrun by conftest.py, never collected.

    two_ranks.py POLICY MODEL OUT ROWS,PARTIAL_GROUPS[,resumed|,served]...

Each run writes ``OUT/ROWS PARTIAL_GROUPS [resumed ]rank N.json``; of one that is ``served`` a vLLM server's answers are
the completions. A run that is to fail comes last: it leaves the
process group in a state that the next should not depend on.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import datasets
import torch
import trl
import two_ranks_state
import vllm_server
from conftest import policy_tokenizer

from rmcore.engine import RewardEngine
from rmcore.integrations.trl import PairwiseReward
from rmcore.model import RewardModel


def main(policy: str, model: str, out: str, *runs: str) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects at the start of every training: not through all that was imported
    for run in runs:
        rows, partial_groups, *kind = run.split(",")
        name = run.replace(",", " ")
        if kind == ["served"]:
            with vllm_server.vllm_server(serves=os.environ["RANK"] == "0") as url:
                told = train(policy, model, out, int(rows), partial_groups, url)
        elif kind:
            told = two_ranks_state.train(policy, model, str(Path(out, name)), int(rows), partial_groups)
        else:
            told = train(policy, model, out, int(rows), partial_groups)
        Path(out, f"{name} rank {os.environ['RANK']}.json").write_text(json.dumps(told))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def train(
    policy: str, model: str, out: str, rows: int, partial_groups: str, server: str | None = None
) -> dict[str, object]:
    """What this rank's reward function saw and the advantages it trained on, or the error."""
    engine = RewardEngine(RewardModel.from_pretrained(model))
    reward = PairwiseReward(engine, partial_groups=partial_groups)  # type: ignore[arg-type]
    seen: list[dict[str, object]] = []

    async def spied(**kwargs):
        rewards = await reward(**kwargs)
        seen.append({"prompts": kwargs["prompts"], "completions": kwargs["completions"], "rewards": rewards})
        return rewards

    # TRL asks the function itself whether it is asynchronous, and binds log_metric of the trainer to the call.
    args = trl.RLOOConfig(
        output_dir=out, per_device_train_batch_size=rows, num_generations=4, max_completion_length=6, max_steps=2,
        report_to=[], save_strategy="no", use_cpu=True, seed=3, beta=0.0, disable_tqdm=True, bf16=False,
        ddp_timeout=1000, logging_steps=1,
        use_vllm=server is not None, vllm_mode="server", vllm_server_base_url=server, vllm_server_timeout=10.0,
    )  # fmt: skip
    prompts = ["red tree house", "blue river stone", "green cloud", "house river red tree"] * 3
    data = datasets.Dataset.from_dict({"prompt": prompts, "prompt_id": list(range(len(prompts)))})
    trainer = trl.RLOOTrainer(
        model=policy, reward_funcs=spied, args=args, train_dataset=data, processing_class=policy_tokenizer()
    )
    generate, theirs = trainer._generate_and_score_completions, []

    def keep(inputs):
        result = generate(inputs)
        theirs.append(result["advantages"].tolist())
        return result

    trainer._generate_and_score_completions = keep
    try:
        trainer.train()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"seen": seen, "advantages": theirs}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(*sys.argv[1:])
