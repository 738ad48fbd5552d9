"""The optimiser of heads is torch's own, without what its classes import."""

from __future__ import annotations

import pytest
import torch

from rmcore.head.adam import Adam, cosine_rate


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_torchs(weight_decay):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator, dtype=torch.float64)]
    ours, theirs = ([t.clone().requires_grad_() for t in start] for _ in range(2))
    adam = Adam(ours, 1e-2, betas=(0.9, 0.95), weight_decay=weight_decay)
    other = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=weight_decay, foreach=False)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(other, 7)
    for step in range(7):
        for tensors in (ours, theirs):
            gradients = torch.autograd.grad(sum((t.double() - 1).pow(4).sum() for t in tensors), tensors)
            if tensors is ours:
                adam.step(gradients, cosine_rate(1e-2, step, 7))
                continue
            for tensor, gradient in zip(theirs, gradients, strict=True):
                tensor.grad = gradient
            other.step()
            schedule.step()
        for mine, his in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, his, rtol=1e-6, atol=1e-8)  # the rate is theirs to the last bits


def test_without_decay_it_is_adam():
    generator = torch.Generator().manual_seed(0)
    mine, theirs = (torch.ones(5, requires_grad=True) for _ in range(2))
    own, reference = Adam([mine], 0.1), torch.optim.Adam([theirs], lr=0.1)
    for _ in range(5):
        gradient = torch.randn(5, generator=generator)
        own.step([gradient])
        theirs.grad = gradient
        reference.step()
    torch.testing.assert_close(mine, theirs)


def test_training_heads_does_not_bring_the_compiler(torch_python):
    code = (
        "import sys, torch\n"
        "from rmcore.head.attributes import FitOptions\n"
        "from rmcore.head.estimators import URM, Ensemble\n"
        "h, p = torch.randn(8, 3), torch.arange(8).view(4, 2)\n"
        "Ensemble.fit(h, torch.ones(4), p, members=2, layers=(2,), epochs=1)\n"
        "URM.fit(h, torch.ones(4), p, options=FitOptions(steps=2, holdout=0))\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    done = torch_python.start(code)
    out, error = done.communicate(timeout=120)
    assert out.strip() == "False", error
