"""Time of ``score`` against three plain torch products, in the form ``kernels benchmark`` runs."""

import math

import torch
from kernels.benchmark import Benchmark


class ScoreBenchmark(Benchmark):
    """h = D = 4096, 16 rows, fp16. Not rotated over copies of the weights: warm, so a bound from below."""

    seed = 42

    def setup(self):
        """Draw a head."""
        size = 4096
        self.hidden = torch.randn(16, size, device=self.device, dtype=torch.float16)
        self.projection = torch.randn(size, size, device=self.device, dtype=torch.float16) / 64
        self.phase, self.beta = torch.rand(2, size, device=self.device)
        self.factor = (torch.randn(size, size, device=self.device) / 64).tril()
        self.tiles, self.scale = self.kernel.pack_factor(self.factor, torch.float16)
        self.out = torch.empty(4, 16, device=self.device)

    def benchmark_base(self):
        """The kernel."""
        self.out = self.kernel.score(
            self.hidden, self.projection, self.phase, self.beta, self.tiles, factor_scale=self.scale
        )

    def verify_base(self):
        """The same in torch."""
        c = torch.cos(2 * math.pi * (self.hidden.float() @ self.projection.float().mT + self.phase))
        g, v = c @ self.beta, (c @ self.factor.mT).square().sum(-1)
        u = torch.sqrt(1 + math.pi / 8 * v)
        return torch.stack([g, v, u, g / u])
