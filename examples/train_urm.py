"""URM in two stages (arXiv:2410.00847): body and attribute heads from labels, then the gate on frozen states.

    accelerate launch --config_file examples/recipes/accelerate-fsdp.yaml examples/train_urm.py helpsteer2.jsonl \
        --backbone meta-llama/Llama-3.1-8B --bf16 --batch 8 --out urm-body
    rmcore train helpsteer2.jsonl --attributes helpfulness,correctness,coherence,complexity,verbosity \
        --pairs hf://Skywork/Skywork-Reward-Preference-80K-v0.2:train --steps 4000 \
        --weights 0.3,0.74,0.46,0.47,-0.33 --backbone urm-body/backbone --out urm --embed-backbone

The first command is this script: rows of prompt, response and a number an attribute, two responses of a prompt at
least (HelpSteer2's train.jsonl, unpacked, as it is). It leaves a model of its own: the body with an SNGP head on which
response is more helpful. On a single GPU or CPU leave `accelerate launch --config_file ...` away.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from rmcore.head.attributes import HELPSTEER2
from rmcore.integrations.training import AttributeLoss, attribute_training_pairs
from rmcore.integrations.trl import PairwiseRewardConfig, PairwiseRewardTrainer
from rmcore.model.backbone import Backbone, BackboneConfig
from rmcore.model.data import read_attributes


def main(arguments: list[str] | None = None) -> PairwiseRewardTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="labelled responses: a file or hf://org/name:split")
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--attributes", default=",".join(HELPSTEER2))
    parser.add_argument("--preference", type=float, default=0.0, help="share of Bradley-Terry beside the labels")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=8, help="pairs of a forward pass on a GPU")
    parser.add_argument("--learning-rate", type=float, default=2e-6)
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--pooling", default="last")
    parser.add_argument("--bf16", action="store_true")
    given = parser.parse_args(arguments)

    names = given.attributes.split(",")
    pairs = attribute_training_pairs(list(read_attributes(given.data, names)))
    args = PairwiseRewardConfig(
        output_dir=f"{given.out}.run",
        num_train_epochs=given.epochs,
        per_device_train_batch_size=given.batch,
        learning_rate=given.learning_rate,
        bf16=given.bf16,
        activation_checkpointing=True,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        save_strategy="epoch",
        logging_steps=10,
        report_to=[],
    )
    config = BackboneConfig(
        name=given.backbone, pooling=given.pooling, max_length=given.max_length, overlong="no-reward"
    )
    backbone = Backbone.from_pretrained(config, dtype=torch.float32, device=args.device)
    loss = AttributeLoss(backbone.hidden_size, names, preference=given.preference)
    trainer = PairwiseRewardTrainer(backbone, args, train_dataset=pairs, loss=loss)
    trainer.train()
    trainer.save_model(str(given.out))
    return trainer


if __name__ == "__main__":
    main()
