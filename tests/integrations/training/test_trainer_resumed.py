"""A training run that is killed goes on to the same bits."""

from __future__ import annotations

import pytest
import torch
from support.trained import HEAD, body_tensors, head_tensors, same

from rmcore._base.errors import CheckpointError, InputError
from rmcore.integrations.training import StreamedPairs
from rmcore.integrations.training.replicated_head import HEAD_STATE_FILE
from rmcore.integrations.trl import PairwiseRewardTrainer

# -- kill and resume -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("posterior", ["pass", "training"])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(posterior, backbone_of, config_of, preferences, tmp_path):
    """A model with dropout, in the middle of the second epoch, with a layer and a trained offset."""

    class KilledError(Exception):
        pass

    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 9:
                raise KilledError

    def make(folder, *callbacks):
        backbone = backbone_of("bert", pooling="mean", model={"hidden_dropout_prob": 0.1})
        args = config_of(
            output_dir=str(tmp_path / folder), max_steps=-1, num_train_epochs=2, save_strategy="steps", save_steps=4,
            lr_scheduler_type="cosine", posterior=posterior,
        )  # fmt: skip
        head = {**HEAD, "mode": "concat", "layer_size": 8}
        return PairwiseRewardTrainer(backbone, args, head=head, train_dataset=preferences, callbacks=list(callbacks))

    whole = make("whole")
    whole.train()
    with pytest.raises(KilledError):
        make("killed", Kill()).train()
    torch.manual_seed(99)
    resumed = make("killed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    assert same(body_tensors(whole), body_tensors(resumed))
    assert same(head_tensors(whole), head_tensors(resumed))
    assert torch.equal(whole.frozen.beta, resumed.frozen.beta)
    assert torch.equal(whole.frozen.posterior.precision, resumed.frozen.posterior.precision)
    assert whole.frozen.posterior.count == resumed.frozen.posterior.count == 2 * len(preferences)


def test_a_stream_that_was_killed_in_its_second_pass_goes_on_to_the_same_bits(
    backbone_of, config_of, preferences, tmp_path
):
    """Six batches a pass: the run of nine steps is begun again from the seventh, with shared prefixes."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    def make(folder, *callbacks):
        settings = {"share_prefixes": True, "max_steps": 9, "save_strategy": "steps", "save_steps": 7}
        args = config_of(output_dir=str(tmp_path / folder), **settings)
        backbone = backbone_of()
        stream = StreamedPairs(backbone, lambda: iter(preferences), "difference")
        return PairwiseRewardTrainer(backbone, args, head=HEAD, train_dataset=stream, callbacks=list(callbacks))

    whole = make("whole")
    whole.train()
    make("killed", Stop()).train()
    resumed = make("killed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 9
    assert same(body_tensors(whole), body_tensors(resumed))
    assert same(head_tensors(whole), head_tensors(resumed))
    assert torch.equal(whole.frozen.beta, resumed.frozen.beta)
    assert whole.frozen.posterior.count == 24  # each pair once, whatever passes were trained on
    with pytest.raises(InputError, match=r"^posterior: got 'training' with a stream"):
        PairwiseRewardTrainer(
            backbone_of(), config_of(posterior="training"), head=HEAD, train_dataset=whole.train_dataset
        )


def test_a_checkpoint_of_another_head_is_refused(backbone_of, config_of, preferences):
    args = config_of(max_steps=1, save_strategy="steps", save_steps=1, posterior="none")
    PairwiseRewardTrainer(backbone_of(), args, head=HEAD, train_dataset=preferences).train()
    other = PairwiseRewardTrainer(backbone_of(), args, head={**HEAD, "ridge": 2.0}, train_dataset=preferences)
    folder = f"{args.output_dir}/checkpoint-1"
    with pytest.raises(CheckpointError, match="got a head of"):
        other.train(resume_from_checkpoint=folder)
    with open(f"{folder}/{HEAD_STATE_FILE}", "wb") as file:
        file.write(b"no tensors")
    with pytest.raises(CheckpointError, match="no state of a head"):
        other.train(resume_from_checkpoint=folder)
