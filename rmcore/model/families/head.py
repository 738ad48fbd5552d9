"""A family's head: from pooled states to rows that a linear head serves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rmcore._base.errors import CheckpointError
from rmcore.head.attributes.scores import AttributeScores
from rmcore.model.families.serving import no_kernel, serving_weights
from rmcore.model.families.spec import Gate, Head, Key, Size, Stack
from rmcore.model.families.tensors import TensorFiles
from rmcore.ops import score_attributes
from rmcore.ops.attribute_weights import AttributeWeights
from rmcore.ops.dispatch import Explanation, explain

__all__ = ["RewardHead"]

_BATCH_NORM_EPS = 1e-5
_BEAVER_EPS = 1e-8
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "selu": functional.selu,
    "tanh": torch.tanh,
    "leaky_relu": functional.leaky_relu,
}


class _Reader:
    """Takes tensors by name and remembers which; what is missing or of another shape is an error that names it."""

    def __init__(self, files: TensorFiles, config: Mapping[str, Any], family: str) -> None:
        self.files = files
        self.config = config
        self.family = family
        self.used: set[str] = set()

    def take(self, name: str, *shape: int | None) -> Tensor:
        """A tensor of this shape, None for any width. Raises CheckpointError."""
        if name not in self.files:
            raise CheckpointError(f"{self.files.source}: got no tensor {name!r}, which family {self.family!r} wants")
        found = self.files.shape(name)
        if len(found) != len(shape) or any(w not in (None, f) for w, f in zip(shape, found, strict=True)):
            wanted = ", ".join("any" if width is None else str(width) for width in shape)
            raise CheckpointError(
                f"{self.files.source}: {name}: got shape {found}, family {self.family!r} wants ({wanted})"
            )
        self.used.add(name)
        tensor = self.files.read(name)
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise CheckpointError(
                f"{self.files.source}: {name}: got {tensor.dtype}, expected the head as it is: quantise a body alone"
            )
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{self.files.source}: {name}: got NaN or Inf, expected finite values")
        return tensor

    def optional(self, name: str, *shape: int | None) -> Tensor | None:
        """:meth:`take`, or None where there is no such tensor."""
        return self.take(name, *shape) if name in self.files else None

    def size(self, size: Size) -> int | None:
        """A width as a number, None for any."""
        return size if size is None or isinstance(size, int) else int(size.of(self.config))

    def number(self, value: float | Key) -> float:
        """A number, the configuration's where it is a key."""
        return float(value.of(self.config)) if isinstance(value, Key) else float(value)


@dataclass
class _Dense:
    """One linear layer, and what is behind it: an activation, then batch normalisation with its running statistics."""

    weight: Tensor
    bias: Tensor | None
    activation: str = ""
    norm: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = functional.linear(x, self.weight, self.bias)
        if self.activation:
            x = _ACTIVATIONS[self.activation](x)
        if self.norm is not None:
            weight, bias, mean, var = self.norm
            x = functional.batch_norm(x, mean, var, weight, bias, eps=_BATCH_NORM_EPS)
        return x

    def to(self, device: torch.device, dtype: torch.dtype) -> _Dense:
        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, dtype)

        norm = None if self.norm is None else tuple(t.to(device, dtype) for t in self.norm)
        weight = self.weight.to(device, dtype)
        return _Dense(weight, moved(self.bias), self.activation, norm)  # type: ignore[arg-type]


def _dense_layers(stack: Stack, reader: _Reader, width: int, token_id: Callable[[str], int]) -> list[_Dense]:
    names = stack.names(reader.config, reader.files.names)
    layers: list[_Dense] = []
    for k, name in enumerate(names):
        last = k == len(names) - 1
        weight_name = f"{name}.weight"
        if last and weight_name not in reader.files and reader.config.get("tie_word_embeddings") and stack.tied:
            weight_name = stack.tied
        weight = reader.take(weight_name, reader.size(stack.out if last else stack.hidden), width)
        wanted = stack.bias if last else stack.hidden_bias
        wanted = bool(wanted.of(reader.config)) if isinstance(wanted, Key) else wanted
        bias = None
        if wanted is not False:
            bias = (reader.take if wanted else reader.optional)(f"{name}.bias", weight.shape[0])
        if last and stack.rows:
            places = [row if isinstance(row, int) else token_id(row) for _, row in stack.rows]
            if max(places) >= weight.shape[0]:
                raise CheckpointError(f"{reader.files.source}: {weight_name}: got no row {max(places)}")
            factors = torch.tensor([factor for factor, _ in stack.rows], dtype=torch.float64)
            weight = (factors @ weight[places].double())[None].to(torch.float32)
        norm = None
        if not last and stack.norm is not None:
            head, _, place = name.rpartition(".")
            behind = f"{head}.{int(place) + stack.norm}"
            parts = [reader.take(f"{behind}.{part}", weight.shape[0]) for part in _NORM_PARTS]
            reader.used.add(f"{behind}.num_batches_tracked")
            norm = (parts[0], parts[1], parts[2], parts[3])
        layers.append(_Dense(weight, bias, "" if last else stack.activation, norm))
        width = weight.shape[0]
    return layers


_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


def _run(layers: list[_Dense], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class RewardHead:
    """The head of one loaded model.

    A row is φ, the input of the head's last linear layer, so that a Laplace approximation of that layer is exact; the
    score is ``weight · row + bias``. Where a gate or a softmax stands behind φ, the row has the score itself as a last
    entry and the weight is 1 there and 0 elsewhere. Then a fit around it sees the model γ r + δ·φ at γ = 1, δ = 0: for
    a gate that the prompt alone decides, r is w(x)·φ, and a pair's difference stays linear in φ₁ − φ₂.

    Args:
        spec: the family's head.
        files: tensors by name.
        config: ``config.json``.
        hidden_size: of the body.
        family: its name, for messages.
        token_id: the id of a token's text.
    """

    def __init__(
        self,
        spec: Head,
        files: TensorFiles,
        config: Mapping[str, Any],
        hidden_size: int,
        *,
        family: str,
        token_id: Callable[[str], int],
    ) -> None:
        self.spec = spec
        reader = _Reader(files, config, family)
        states = len(spec.terms[0][1])
        self._layers = _dense_layers(spec.values, reader, states * hidden_size, token_id)
        last = self._layers.pop()
        self._last = last
        self._per = reader.size(spec.per) or 1
        outputs = last.weight.shape[0]
        if outputs % self._per:
            raise CheckpointError(
                f"{files.source}: {spec.values.name}: got {outputs} outputs, expected {self._per} an attribute"
            )
        self._count = outputs // self._per
        self._transform = None
        if spec.transform:
            self._transform = reader.take(spec.transform, self._count, self._count)
        self._gate: list[_Dense] = []
        self._gate_scale: Tensor | None = None
        self._softmax, self._temperature = False, 1.0
        if isinstance(spec.weights, Gate):
            self._read_gate(spec.weights, reader, hidden_size, token_id)
        elif isinstance(spec.weights, tuple) and len(spec.weights) != self._count:
            raise CheckpointError(
                f"{files.source}: {spec.values.name}: got {self._count} attributes, expected {len(spec.weights)}"
            )
        elif spec.weights is None and self._count != 1:
            raise CheckpointError(f"{files.source}: {spec.values.name}: got {self._count} outputs, expected 1")
        self._shift, self._scale = _normaliser(spec, reader)
        self.used = reader.used
        self.width = last.weight.shape[1] + (not spec.linear)
        self.full_width = self.width + (self._count if self._gate else 0)
        self._sign_sum = sum(sign for sign, _ in spec.terms)
        self._no_kernel = no_kernel(spec, self._layers, last, self._gate, softmax=self._softmax)
        self._serving: AttributeWeights | None = None
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def _read_gate(self, gate: Gate, reader: _Reader, hidden_size: int, token_id: Callable[[str], int]) -> None:
        self._gate = _dense_layers(gate.stack, reader, hidden_size, token_id)
        if self._gate[-1].weight.shape[0] != self._count:
            raise CheckpointError(
                f"{reader.files.source}: {gate.stack.name}: got {self._gate[-1].weight.shape[0]} attribute weights for "
                f"{self._count} attributes"
            )
        self._softmax = gate.softmax if isinstance(gate.softmax, bool) else bool(gate.softmax.of(reader.config))
        self._temperature = reader.number(gate.temperature)
        if not (math.isfinite(self._temperature) and self._temperature > 0):
            raise CheckpointError(f"{reader.files.source}: got a gating temperature of {self._temperature}")
        self._gate_scale = reader.take(gate.scale, 1) if gate.scale else None

    def to(self, device: torch.device, body_dtype: torch.dtype) -> RewardHead:
        """Move it beside its body; it computes in the body's dtype where the family's own code does. Returns itself."""
        self.device, self._serving = device, None
        self.dtype = body_dtype if self.spec.dtype == "body" else torch.float32
        self._layers = [layer.to(device, self.dtype) for layer in self._layers]
        self._gate = [layer.to(device, self.dtype) for layer in self._gate]
        # Of a linear head the last layer is served as β: there is no reason to round what its file holds.
        self._last = self._last.to(device, torch.float32 if self.spec.linear else self.dtype)
        if self._transform is not None:
            self._transform = self._transform.to(device, self.dtype)
        if self._gate_scale is not None:
            self._gate_scale = self._gate_scale.to(device, self.dtype)
        return self

    def linear_weights(self) -> tuple[Tensor, float]:
        """(weight (width,) float32, bias) of the score over :meth:`rows`."""
        if not self.spec.linear:
            weight = torch.zeros(self.width, device=self.device)
            weight[-1] = 1.0
            return weight, 0.0
        # score = Σ_m c_m Σ_k T_km (A y)_k for y = W φ + b, folded into one vector over the outputs, in float64
        c = torch.ones(self._count, dtype=torch.float64, device=self.device)
        if isinstance(self.spec.weights, tuple):
            c = torch.tensor(self.spec.weights, dtype=torch.float64, device=self.device)
        elif self.spec.weights == "mean":
            c = c / self._count
        if self._transform is not None:
            c = self._transform.double() @ c
        over_outputs = torch.zeros(self._count, self._per, dtype=torch.float64, device=self.device)
        if self.spec.attributes == "quantiles":
            over_outputs[:] = c[:, None] / self._per
        else:
            over_outputs[:, 0] = c  # of a normal's two outputs the first is its mean
        over_outputs = over_outputs.flatten()
        factor = self.spec.sign / self._scale
        weight = factor * (over_outputs @ self._last.weight.double())
        bias = 0.0 if self._last.bias is None else self._sign_sum * float(over_outputs @ self._last.bias.double())
        return weight.float(), factor * (bias - self._shift)

    def rows(self, states: Tensor) -> Tensor:
        """Rows (n, width) float32 of pooled states (n, S, h), with their graph."""
        return self._rows(states)[0]

    def full_rows(self, states: Tensor) -> Tensor:
        """Rows (n, full_width) float32: :meth:`rows`, and behind them the gate's weights, where there is a gate."""
        rows, weights = self._rows(states)
        return rows if weights is None else torch.cat([rows, weights.float()], dim=1)

    def explain(self, rows: int | None = None) -> Explanation:
        """Who computes attributes and gate, for so many rows, when nobody asks for gradients; and why not others.

        A backend of :func:`rmcore.ops.score_attributes`, or ``module``: torch, layer by layer.
        """
        if self._no_kernel is not None:
            return Explanation("module", {"score_attributes": self._no_kernel})
        return explain("score_attributes", self.device, self.dtype, rows=rows, weights=self._kernel())

    def _kernel(self) -> AttributeWeights:
        if self._serving is None:
            self._serving = serving_weights(
                self.spec,
                self._last,
                self._gate,
                per=self._per,
                softmax=self._softmax,
                temperature=self._temperature,
                scale=self._gate_scale,
                eps=_BATCH_NORM_EPS,
                dtype=self.dtype,
            )
        return self._serving

    def _served(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(φ (n, h), outputs (n, A, per), weights (n, A)) by the kernel, of states in the head's dtype."""
        assert isinstance(self.spec.weights, Gate)
        features, own = states[:, self.spec.terms[0][1][0]], self.spec.weights.state
        gate = None if own == self.spec.terms[0][1][0] else states[:, own]
        found = score_attributes(features, self._kernel(), gate_hidden=gate)
        return features, found.outputs.view(len(states), self._count, self._per), found.weights[:, 0]

    def _rows(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """:meth:`rows`, and the gate's weights (n, A): nearly all of a gated head's work, so they are computed once.

        By the kernel where there is one for the layout; gradients go through the layers one by one.
        """
        states = states.to(self.dtype)
        if self._no_kernel is None and not torch.is_grad_enabled():
            features, outputs, weights = self._served(states)
            return torch.cat([features.float(), self._scores(outputs, weights)[:, None]], dim=1), weights
        entered = [sign * _run(self._layers, states[:, list(places)].flatten(1)) for sign, places in self.spec.terms]
        features = torch.stack(entered).sum(0)
        if self.spec.linear:
            return features.float(), None
        weights = self._weights(states)
        return torch.cat([features.float(), self._scores(self._outputs(features), weights)[:, None]], dim=1), weights

    def attributes(self, rows: Tensor) -> AttributeScores | None:
        """What the attributes are, from :meth:`full_rows`; None for a head that has one output and no spread."""
        spec = self.spec
        if (self._count == 1 and spec.attributes == "outputs") or len(spec.terms) > 1:
            return None
        outputs = self._outputs(rows[:, : self._last.weight.shape[1]].to(self._last.weight.dtype)).double()
        weights = torch.ones(self._count, dtype=torch.float64, device=rows.device)
        if self._gate:
            weights = rows[:, self.width :].double()
        elif isinstance(spec.weights, tuple):
            weights = weights.new_tensor(spec.weights)
        elif spec.weights == "mean":
            weights = weights / self._count
        if self._transform is not None:
            weights = weights @ self._transform.double().T
        weights = spec.sign * weights.expand(len(rows), self._count) / self._scale
        parts: dict[str, Tensor] = {}
        if spec.attributes == "normal":
            parts["attribute_std"] = outputs[..., 1].exp()
        elif spec.attributes == "quantiles":
            levels = torch.linspace(0, 1, self._per + 2, dtype=torch.float64)[1:-1]
            parts |= {"quantiles": outputs, "levels": levels}
        elif spec.attributes == "bins":
            bins = torch.linspace(0, 1, self._per, dtype=torch.float64)
            parts |= {"probabilities": outputs.softmax(-1), "bins": bins}
        names = spec.names if len(spec.names) == self._count else tuple(f"attribute_{k}" for k in range(self._count))
        means = self._means(outputs)
        return AttributeScores(names, means.cpu(), weights.cpu(), **{name: part.cpu() for name, part in parts.items()})

    def _outputs(self, features: Tensor) -> Tensor:
        return self._last(features).view(len(features), self._count, self._per)

    def _means(self, outputs: Tensor) -> Tensor:
        if self.spec.attributes == "bins":
            places = torch.linspace(0, 1, self._per, device=outputs.device, dtype=outputs.dtype)
            return (outputs.softmax(-1) * places).sum(-1)
        return outputs.mean(-1) if self.spec.attributes == "quantiles" else outputs[..., 0]

    def _weights(self, states: Tensor) -> Tensor:
        assert isinstance(self.spec.weights, Gate)
        weights = _run(self._gate, states[:, self.spec.weights.state])
        if self._softmax:
            weights = (weights / self._temperature).softmax(-1)
        return weights if self._gate_scale is None else weights * self._gate_scale

    def _scores(self, outputs: Tensor, weights: Tensor) -> Tensor:
        attributes = self._means(outputs)
        if self._transform is not None:
            attributes = attributes @ self._transform.to(attributes)
        score = (weights * attributes).sum(-1).float()
        return self.spec.sign * (score - self._shift) / self._scale

    def tensors(self, files: TensorFiles) -> dict[str, Tensor]:
        """The tensors it was made of, by their names, for a folder of one's own."""
        return {name: files.read(name) for name in sorted(self.used) if name in files}


def _normaliser(spec: Head, reader: _Reader) -> tuple[float, float]:
    """(shift, scale) of score = (r − shift) / scale."""
    config = reader.config
    if spec.normaliser == "mean-std" and config.get("normalize_reward"):
        if "mean" not in config or "std" not in config:
            raise CheckpointError("config.json: got normalize_reward without mean and std, which it normalises by")
        shift, scale = float(config["mean"]), float(config["std"])
    elif spec.normaliser == "beaver":
        mean, var = config.get("mean"), config.get("var")
        stored = reader.optional("normalizer.mean", 1), reader.optional("normalizer.var", 1)
        reader.used.add("normalizer.count")
        if (stored[0] is None) != (stored[1] is None):  # half a normaliser, and the configuration's may be another
            lost = "mean" if stored[0] is None else "var"
            raise CheckpointError(f"{reader.files.source}: got no tensor 'normalizer.{lost}' beside the other")
        if not config.get("do_normalize"):
            return 0.0, 1.0
        shift, variance = _scalar("mean", stored[0], mean), _scalar("var", stored[1], var)
        # Safe RLHF: a reward is shifted and scaled, a cost is scaled alone.
        shift, scale = (0.0 if config.get("score_type") == "cost" else shift), math.sqrt(variance) + _BEAVER_EPS
    else:
        return 0.0, 1.0
    if not (math.isfinite(shift) and math.isfinite(scale) and scale > 0):
        raise CheckpointError(f"config.json: got mean {shift} and standard deviation {scale} to normalise scores by")
    return shift, scale


def _scalar(name: str, stored: Tensor | None, configured: Any) -> float:
    if stored is not None:
        return float(stored[0])
    if configured is None:
        raise CheckpointError(f"config.json: got do_normalize, but {name!r} neither there nor as 'normalizer.{name}'")
    return float(configured[0] if isinstance(configured, (list, tuple)) else configured)
