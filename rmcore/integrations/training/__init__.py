"""Training a backbone and a head together, on transformers' ``Trainer``: data, losses, trainer, posterior.

    from rmcore.integrations.trl import PairwiseRewardConfig, PairwiseRewardTrainer

    trainer = PairwiseRewardTrainer(
        "Qwen/Qwen3-0.6B",
        args=PairwiseRewardConfig(output_dir="run", num_train_epochs=1, bf16=True),
        head={"num_features": 2048, "mode": "concat", "layer_size": 1024},
        train_dataset=preferences,
        eval_dataset=held_out,
    )
    trainer.train()
    trainer.save_model("my-reward-model")  # RewardModel.from_pretrained opens it

Needs transformers' trainer and accelerate: ``pip install 'rmcore[train]'``.
"""

from __future__ import annotations

from rmcore._base import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "rmcore.integrations.training.attributes": ["AttributeLoss", "attribute_training_pairs"],
        "rmcore.integrations.training.config": ["PairwiseRewardConfig"],
        "rmcore.integrations.training.dataset": [
            "PairDataset",
            "StreamedPairs",
            "TrainingPair",
            "read_training_pairs",
        ],
        "rmcore.integrations.training.finetune": ["finetune"],
        "rmcore.integrations.training.losses": ["PairBatch", "PairLoss", "bradley_terry"],
        "rmcore.integrations.training.trainer": ["PairwiseRewardTrainer"],
    },
)
