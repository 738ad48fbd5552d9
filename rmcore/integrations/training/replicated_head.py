"""The head beside a wrapped backbone: whole on every rank, in float32, with an optimiser of its own.

It stands outside of what DDP, FSDP and DeepSpeed wrap. They shard parameters, cast all of them to 16 bits (a phase of
random features in bfloat16 is noise) or keep them whole, each in its own way; a head is a thousandth of a model. So it
is the same code under all of them: gradients are averaged over the ranks once an optimiser step, every rank takes the
same AdamW step from the same state, and then one step of power iteration on W. All ranks keep the same bits.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from rmcore._base.errors import CheckpointError, NonFiniteError
from rmcore._base.files import atomic_file
from rmcore.head.sngp import SNGPHead

__all__ = ["HEAD_STATE_FILE", "HeadCallback", "ReplicatedHead"]

HEAD_STATE_FILE = "rmcore_head_state.safetensors"

_SETTLE_ITERATIONS = 100
"""Power-iteration steps before the first optimiser step: one a step is loose until the vector has settled."""


class ReplicatedHead:
    """A head, a loss's own parameters and their AdamW.

    Args:
        head: trained in place, in eval mode: σ is taken along its vector as it stands.
        loss: its parameters are trained too, where it is a module.
        lr: learning rate at the schedule's peak.
        weight_decay: of W and of the loss's matrices.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them alone.
        betas, eps: AdamW's. A gradient that is zero but for rounding (β₀'s at the start of concat mode) makes a step of
            rounding's sign unless ``eps`` is above it.
        accelerator: of accelerate, which knows the ranks.
    """

    def __init__(
        self,
        head: SNGPHead,
        loss: object,
        *,
        lr: float,
        weight_decay: float,
        max_grad_norm: float,
        accelerator: Any,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.head = head.eval()
        self.loss = loss if isinstance(loss, nn.Module) else None
        self.lr, self.max_grad_norm, self.accelerator = lr, max_grad_norm, accelerator
        own = [p for p in head.parameters() if p.requires_grad]
        if self.loss is not None:
            own += [p for p in self.loss.parameters() if p.requires_grad]
        matrices = [p for p in own if p.dim() > 1]
        self.parameters = [*matrices, *(p for p in own if p.dim() < 2)]
        # β is a vector whose prior is in its gradient; matrices of few weights decay as W does.
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": weight_decay},
                {"params": self.parameters[len(matrices) :], "weight_decay": 0.0},
            ],
            lr=lr,
            betas=betas,
            eps=eps,
        )

    def begin(self) -> None:
        """Let the power iteration settle, and give every rank the first one's head."""
        self.head.step_power_iteration(_SETTLE_ITERATIONS)
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast

            with torch.no_grad():
                for tensor in [*self._modules_tensors().values()]:
                    tensor.copy_(broadcast(tensor.contiguous()))

    def step(self, schedule: float, count: float, at: int) -> None:
        """One optimiser step, on every rank alike, from gradients that each rank has of its own pairs.

        Args:
            schedule: share of the peak learning rate.
            count: of the data, over which β's prior is spread.
            at: number of the step, for a message.

        Raises NonFiniteError on every rank, before anything has changed.
        """
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.accelerator.num_processes > 1:
            flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
            for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                g.copy_(mean.view_as(g))
        beta = self.head.beta
        if beta.grad is not None:
            beta.grad.add_(beta.detach(), alpha=self.head.config.ridge / count)
        limit = self.max_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.parameters, limit))
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"loss: got a gradient of norm {norm} at the head after {at} steps, expected finite values. Lower the "
                "learning rate"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * schedule
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.head.step_power_iteration()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, more: dict[str, Tensor] | None = None) -> None:
        """Write head, loss and optimiser into a checkpoint's folder; the same bits come back."""
        from safetensors.torch import save

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._modules_tensors().items()}
        for k, p in enumerate(self.parameters):
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"adam.{k}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
        tensors |= {f"more.{name}": tensor.detach().cpu().contiguous() for name, tensor in (more or {}).items()}
        with atomic_file(Path(folder, HEAD_STATE_FILE)) as work:
            work.write_bytes(save(tensors, metadata={"head": json.dumps(self.head.config.to_dict(), sort_keys=True)}))

    @torch.no_grad()
    def load(self, folder: str | Path) -> dict[str, Tensor]:
        """Take all of a checkpoint's state; what was saved as ``more`` is returned.

        Raises CheckpointError where the file is missing, or of another head.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(folder, HEAD_STATE_FILE)
        try:
            with safe_open(path, "pt") as file:
                found = json.loads((file.metadata() or {}).get("head", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path}: got no state of a head ({error}), expected what training wrote") from error
        own = json.loads(json.dumps(self.head.config.to_dict(), sort_keys=True))
        if found != own:
            raise CheckpointError(f"{path}: got a head of {found}, expected one of {own}")
        for name, tensor in self._modules_tensors().items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{path}: got no {name} of shape {tuple(tensor.shape)}, expected this head's state"
                )
            tensor.copy_(tensors[name])
        self.optimizer.state.clear()
        for k, p in enumerate(self.parameters):
            state = {name.split(".", 2)[2]: t for name, t in tensors.items() if name.startswith(f"adam.{k}.")}
            if state:
                self.optimizer.state[p] = {
                    key: t.clone() if key == "step" else t.to(p.device) for key, t in state.items()
                }
        return {name.removeprefix("more."): t for name, t in tensors.items() if name.startswith("more.")}

    def _modules_tensors(self) -> dict[str, Tensor]:
        tensors = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items() if tensor.numel()}
        if self.loss is not None:
            tensors |= {f"loss.{name}": tensor for name, tensor in self.loss.state_dict().items()}
        return tensors


class HeadCallback(TrainerCallback):  # type: ignore[misc]
    """Tells the trainer of the moments that have no method of their own."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A new sum of the covariance."""
        self.trainer.begin_epoch()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are whole, clipped and finite."""
        self.trainer.step_head()
