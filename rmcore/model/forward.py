"""One forward pass: the tokens of a padded batch or of a packed tree to pooled states, up to the layer that is read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rmcore._base.errors import CheckpointError
from rmcore.model.backbone_config import BackboneConfig
from rmcore.model.encoding.architecture import block, text_config
from rmcore.model.encoding.packing import Pack
from rmcore.model.encoding.sharing import Kind
from rmcore.model.encoding.tree_attention import attending
from rmcore.model.families.load import Loaded

__all__ = ["ForwardPass"]


class _EnoughError(Exception):
    """Carries a layer's output out of a forward pass that need not go on."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class ForwardPass:
    """How one model's states are computed and pooled; one caller at a time, whatever the threads.

    Args:
        model: a Hugging Face model; may be replaced by one that wraps it (PEFT).
        config: the pooling, and the layer that is read.
        final_linear: a classifier's last linear layer, whose input is read; None for the configured layer's states.
        separator: token that opens the second type of tokens, for models with token types.
        published: of a published reward model, where its family pools and what its head reads.
    """

    def __init__(
        self,
        model: Any,
        config: BackboneConfig,
        *,
        final_linear: torch.nn.Linear | None,
        separator: int | None,
        published: Loaded | None,
    ) -> None:
        self.model, self.config = model, config
        self.final_linear, self.separator, self.published = final_linear, separator, published
        self.lock = threading.RLock()

    def pooled_states(
        self, input_ids: Tensor, attention_mask: Tensor, *, full: bool = False, through: Any = None
    ) -> Tensor:
        """Pool a right-padded batch (B, T) → (B, h'), keeping the graph if grad is on. No length feature.

        With ``full`` the weights of a published model's gate follow, where it has one. ``through`` is what a trainer
        has wrapped the model in (DDP, FSDP, a DeepSpeed engine), whose forward is called in the model's place.
        """
        states = self.token_states(input_ids, attention_mask, through=through)
        return self.pool(states, input_ids, attention_mask, full=full)

    def token_states(self, input_ids: Tensor, attention_mask: Tensor, *, through: Any = None) -> Tensor:
        """States (B, T, h) of all tokens of a right-padded batch, as :meth:`pool` takes them."""
        return self._states(self.model_inputs(input_ids, attention_mask), through)

    def pool(self, states: Tensor, input_ids: Tensor, attention_mask: Tensor, *, full: bool = False) -> Tensor:
        """The second half of :meth:`pooled_states`: (B, T, h) → (B, h')."""
        if self.published is not None:
            lengths = attention_mask.sum(1).tolist()
            texts = [row[:length] for row, length in zip(input_ids.tolist(), lengths, strict=True)]
            index = torch.tensor([self.published.pooler.positions(text) for text in texts], device=states.device)
            found = states[torch.arange(len(states), device=states.device)[:, None], index]
            return self.published.head.full_rows(found) if full else self.published.head.rows(found)
        states = states.float()
        if states.dim() == 2:  # a classifier that pools by itself
            return states
        if self.config.pooling == "mean":
            mask = attention_mask[..., None].to(states.dtype)
            return (states * mask).sum(1) / mask.sum(1)
        count = attention_mask.sum(1)
        if self.config.pooling == "classifier":
            # Decoders score every position; transformers reads the last one that is not the padding token, which a real
            # token may be too where eos doubles as padding.
            pad = text_config(self.model).pad_token_id
            scored = attention_mask if pad is None else attention_mask * (input_ids != pad)
            index = (scored * torch.arange(scored.shape[1], device=scored.device)).argmax(1)
        else:
            index = count - 1 if self.config.pooling == "last" else torch.zeros_like(count)
        return states[torch.arange(len(states), device=states.device), index]

    def encode_pack(self, pack: Pack, texts: Sequence[Sequence[int]], kind: Kind) -> tuple[Tensor, int]:
        """Pooled states (n, h') of the texts a pack completes, and the attention calls of the forward pass."""
        with self.lock, torch.inference_mode(), attending(self.model, pack, kind) as plan:
            states = self.tree_states(pack)
        return self.pool_tree(states, pack, texts, full=True), plan.calls

    def tree_states(self, pack: Pack, *, through: Any = None) -> Tensor:
        """States (1, T, h) of all tokens of a packed tree, keeping the graph if grad is on.

        Called within :func:`~rmcore.model.encoding.tree_attention.attending`; ``through`` as in :meth:`pooled_states`.
        """
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(pack.ids)[None].to(self.model.device),
            "position_ids": torch.from_numpy(pack.positions)[None].to(self.model.device),
        }
        if getattr(text_config(self.model), "use_cache", None) is not None:
            inputs["use_cache"] = False
        return self._states(inputs, through)

    def pool_tree(self, states: Tensor, pack: Pack, texts: Sequence[Sequence[int]], *, full: bool = False) -> Tensor:
        """Pool what :meth:`tree_states` gives → (n, h') of the texts that the pack completes, in its order."""
        states = states[0]
        if self.config.pooling == "mean":
            # Sums over paths: a node's is its parent's and its own tokens'.
            sums: list[Tensor] = []
            for start, stop, _, parent in pack.spans:
                own = states[start:stop].sum(0, dtype=torch.float32)
                sums.append(own if parent < 0 else sums[parent] + own)
            return torch.stack([sums[leaf] / len(text) for leaf, text in zip(pack.leaves, texts, strict=True)])
        if self.published is not None:
            positions = self.published.pooler.positions
            places = [
                [pack.index(leaf, position) for position in positions(text)]
                for leaf, text in zip(pack.leaves, texts, strict=True)
            ]
            found = states[torch.tensor(places, device=states.device)]
            return self.published.head.full_rows(found) if full else self.published.head.rows(found)
        where = [pack.index(leaf, self._pooled_at(text)) for leaf, text in zip(pack.leaves, texts, strict=True)]
        return states[torch.tensor(where, device=states.device)].float()

    def _pooled_at(self, text: Sequence[int]) -> int:
        if self.config.pooling == "first":
            return 0
        pad = text_config(self.model).pad_token_id if self.config.pooling == "classifier" else None
        return next((k for k in range(len(text) - 1, -1, -1) if pad is None or text[k] != pad), 0)

    def _states(self, inputs: dict[str, Any], through: Any = None) -> Tensor:
        """States (B, T, h) of the configured layer, or what enters a classifier's last linear layer."""
        model = self.model if through is None else through
        with self.lock:  # hooks and the attention's name are set on the model itself, so one caller at a time
            register: Callable[[Any], Any] | None = None
            if self.final_linear is not None:
                register = self.final_linear.register_forward_pre_hook
            elif self.config.layer is not None:
                register = block(self.model, self.config.layer).register_forward_hook
            if register is None:
                states: Tensor = model(**inputs).last_hidden_state
                return states
            return self._stopped(register, inputs) if model is self.model else self._seen(register, model, inputs)

    def model_inputs(self, input_ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """What the model's forward takes for a batch (B, T) and its mask."""
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
        if getattr(text_config(self.model), "use_cache", None) is not None:
            inputs["use_cache"] = False
        if self.separator is not None:
            # What the tokenizer gives two texts: type 1 behind the first separator. Content never holds a separator.
            separators = (input_ids == self.separator).long()
            inputs["token_type_ids"] = ((separators.cumsum(1) - separators) > 0).long() * mask
        return inputs

    def _seen(self, register: Callable[[Any], Any], model: Any, inputs: dict[str, Any]) -> Tensor:
        """As :meth:`_stopped` through a wrapped model, whose own hooks want its forward pass to go on to its end."""
        found: list[Tensor] = []

        def keep(_module: object, inputs: Any, *output: Any) -> None:
            seen = output[0] if output else inputs
            found.append(seen[0] if isinstance(seen, tuple) else seen)

        handle = register(keep)
        try:
            model(**inputs)
        finally:
            handle.remove()
        if not found:
            raise CheckpointError(f"backbone: a layer of {type(self.model).__name__} that is to be read never ran")
        return found[0]

    def _stopped(self, register: Callable[[Any], Any], inputs: dict[str, Any]) -> Tensor:
        """Run the model only until a hook that ``register`` sets fires; what the hook saw (output, or input before)."""

        def stop(_module: object, inputs: Any, *output: Any) -> None:
            seen = output[0] if output else inputs
            raise _EnoughError(seen[0] if isinstance(seen, tuple) else seen)

        handle = register(stop)
        try:
            self.model(**inputs)
        except _EnoughError as enough:
            return enough.hidden
        finally:
            handle.remove()
        raise CheckpointError(f"backbone: a layer of {type(self.model).__name__} that is to be read never ran")
