"""On the device at hand: a GPU, or the CPU with TRITON_INTERPRET=1."""

import math

import pytest
import rmcore_head
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("rows", [1, 65])
def test_score(rows):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 64, generator=generator)
    projection = torch.randn(150, 64, generator=generator) / 8
    phase, beta = torch.rand(150, generator=generator), torch.randn(150, generator=generator)
    factor = torch.randn(150, 150, generator=generator).tril()
    tiles, scale = rmcore_head.pack_factor(factor, torch.float32)
    given = [t.to(DEVICE) for t in (hidden, projection, phase, beta, tiles)]
    got = rmcore_head.score(*given, beta0=0.5, factor_scale=scale).cpu().double()
    c = torch.cos(2 * math.pi * (hidden.double() @ projection.double().mT + phase.double()))
    g = c @ beta.double() + 0.5
    v = (c @ factor.double().mT).square().sum(-1)
    u = torch.sqrt(1 + math.pi / 8 * v)
    torch.testing.assert_close(got, torch.stack([g, v, u, g / u]), rtol=1e-4, atol=1e-4)


def test_power_iteration():
    weight = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    sigma, _ = rmcore_head.power_iteration(weight.to(DEVICE), torch.ones(40, device=DEVICE), 100)
    assert float(sigma) == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-3)
