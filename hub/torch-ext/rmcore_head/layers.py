"""The head as a layer that ``kernels.kernelize`` can put in another's place: no state of its own, forward only."""

from torch import Tensor, nn

__all__ = ["ScoreHead"]


class ScoreHead(nn.Module):
    """hidden (B, h) → (4, B): g, v, u, p, from the buffers of the layer it replaces."""

    has_backward = False
    can_torch_compile = True

    projection: Tensor
    phase: Tensor
    beta: Tensor
    tiles: Tensor
    beta0: float
    factor_scale: float
    amplitude: float

    def forward(self, hidden: Tensor) -> Tensor:
        """See ``score``."""
        from . import score

        return score(
            hidden,
            self.projection,
            self.phase,
            self.beta,
            self.tiles,
            beta0=self.beta0,
            factor_scale=self.factor_scale,
            amplitude=self.amplitude,
        )
