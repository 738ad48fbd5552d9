"""A judge's labels beside people's: the weight that people's pairs choose, and whether it helped."""

from __future__ import annotations

import pytest
import torch

from rmcore._base.errors import InputError
from rmcore.evaluation.ai_weight import ai_weight_report
from rmcore.head.config import HeadConfig
from rmcore.head.fit import fit
from rmcore.head.sngp import SNGPHead
from rmcore.model.ai_weight import EncodedPairs, fit_mixed, held_out_losses

CONFIG = HeadConfig(12, features="linear", ridge=1.0)
TRUTH = torch.linspace(-1, 1, 12)


def made(count, seed, *, label, prompts=None, concat=False):
    """Pairs whose better response is the one along TRUTH; ``label`` makes their labels of the true probability."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * count, 12, generator=generator)
    pairs = torch.arange(2 * count).view(-1, 2)
    p = torch.sigmoid(2 * (hidden[0::2] - hidden[1::2]) @ TRUTH)
    labels = label(p, generator)
    if concat:
        labels = torch.stack([labels, 1 - labels], 1).flatten()
    return EncodedPairs(
        hidden, labels, None if concat else pairs, prompts or [f"{seed}-{k // 2}" for k in range(count)]
    )


def drawn(p, generator):
    return (torch.rand(p.shape, generator=generator) < p).float()


def test_a_good_judge_helps_and_a_bad_one_gets_no_weight():
    human = made(60, 0, label=drawn)
    good = made(600, 1, label=lambda p, _: p)
    report = ai_weight_report(held_out_losses(CONFIG, human, good), human.prompts, len(good), replicates=200)
    assert report.weight >= 0.5
    assert report.helped == "yes"
    assert report.trials[0].weight == 0
    assert report.trials[0].loss > min(trial.loss for trial in report.trials)
    bad = made(600, 2, label=lambda p, _: 1 - p)
    report = ai_weight_report(held_out_losses(CONFIG, human, bad), human.prompts, len(bad), replicates=200)
    assert (report.weight, report.helped) == (0, "no")
    assert "do not help" in report.to_markdown()


def test_weight_0_is_people_alone_and_a_soft_label_is_two_hard_ones():
    human, ai = made(40, 0, label=drawn), made(30, 1, label=lambda p, _: p)
    given = (human.hidden, human.labels, human.pairs)
    alone, _ = fit(SNGPHead(CONFIG), *given[:2], pairs=given[2])
    assert torch.equal(fit_mixed(SNGPHead(CONFIG), given, ai, 0.0)[0].beta, alone.beta)
    hard = EncodedPairs(
        ai.hidden, torch.cat([torch.ones(30), torch.zeros(30)]), torch.cat([ai.pairs, ai.pairs]), list(range(60))
    )
    soft, _ = fit_mixed(SNGPHead(CONFIG), given, ai, 0.5)
    counts = torch.cat([torch.ones(40), 0.5 * ai.labels, 0.5 * (1 - ai.labels)])
    rows = torch.cat([human.hidden, ai.hidden])
    split, _ = fit(
        SNGPHead(CONFIG), rows, torch.cat([human.labels, hard.labels]),
        pairs=torch.cat([human.pairs, hard.pairs + 80]), sample_weight=counts,
    )  # fmt: skip
    assert torch.allclose(soft.beta, split.beta, atol=1e-5)


def test_a_judges_pair_on_a_prompt_left_out_is_left_out_too():
    """The judge copies people's labels of the same pairs: nothing is to be gained on prompts that it has not seen."""
    human = made(40, 0, label=drawn)
    copied = EncodedPairs(human.hidden, human.labels, human.pairs, human.prompts)
    held = held_out_losses(CONFIG, human, copied, weights=(1.0,), folds=4)
    doubled = held_out_losses(CONFIG, human, copied, weights=(0.0,), folds=4)
    # Counting each of people's pairs twice is what it comes to; had the fold's own been among them, loss would fall.
    assert float(held.loss[1].mean()) > 0.9 * float(doubled.loss[0].mean())
    assert len({held.fold[k].item() for k in range(40)}) == 4
    assert all(held.fold[k] == held.fold[k + 1] for k in range(0, 40, 2)), "pairs of a prompt stay together"


def test_concat_mode_and_what_is_wrong():
    config = HeadConfig(12, features="linear", mode="concat")
    human, ai = made(20, 0, label=drawn, concat=True), made(20, 1, label=drawn, concat=True)
    held = held_out_losses(config, human, ai, weights=(1.0,), folds=2)
    assert held.loss.shape == (2, 20)
    assert bool(held.loss.isfinite().all())
    with pytest.raises(InputError, match="another mode"):
        held_out_losses(CONFIG, made(20, 0, label=drawn), ai)
    with pytest.raises(InputError, match="0 or more"):
        held_out_losses(config, human, ai, weights=(-1.0,))
    with pytest.raises(InputError, match="a part for each"):
        held_out_losses(config, human, ai, folds=50)
    with pytest.raises(InputError, match="one a pair"):
        EncodedPairs(human.hidden, human.labels, None, ["x"])
