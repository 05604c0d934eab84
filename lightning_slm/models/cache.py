"""What a decoder remembers between calls: keys and values of attention, states of everything else."""

# Shape letters: B = batch, K = key-value heads, T = tokens of this call, d = head width.

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

_SLIDING = ("sliding_attention", "hybrid_sliding")
_FULL = ("full_attention", "hybrid")


class _NoKeys(CacheLayerMixin):
    """The slot of a layer without keys and values: its state does not grow."""

    def __init__(self) -> None:
        super().__init__()
        self.cumulative_length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise ValueError("this layer keeps states, no keys and values.")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError("this layer keeps states, no keys and values.")

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Nothing here knows the batch."""


class SLMCache(DynamicCache):
    """A cache for any pattern of mixers, made from the model's configuration.

    Beside transformers' keys and values it holds, for every virtual layer, a dict of named states, batch first
    (`Context.state` and `Context.keep`), and how many tokens it has seen. Beam search reorders all of it. It cannot be
    cropped where layers keep states: they hold no past to go back to.

    Args:
        config: an ``SLMConfig``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=None)
        self.layers = [_slot(kind, config) for kind in config.layer_types]
        self.layer_class_to_replicate = None
        self.states: list[dict[str, Tensor]] = [{} for _ in config.layer_types]
        self.seen = 0

    def state(self, layer_idx: int) -> dict[str, Tensor]:
        """The named states of a layer; empty before its first call."""
        return self.states[layer_idx]

    def keep(self, layer_idx: int, state: dict[str, Tensor]) -> None:
        """Replace named states of a layer; those not named stay."""
        self.states[layer_idx].update(state)

    def advance(self, tokens: int) -> None:
        """All layers have read so many further tokens."""
        self.seen += tokens
        for layer in self.layers:
            if isinstance(layer, _NoKeys):
                layer.cumulative_length = self.seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen."""
        return self.seen

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile around it: its shapes change."""
        return False

    def nbytes(self) -> int:
        """Bytes of everything it holds now."""
        layers: Any = self.layers
        kept = [t for layer in layers for t in (layer.keys, layer.values) if isinstance(t, Tensor)]
        kept += [t for state in self.states for t in state.values()]
        return sum(t.numel() * t.element_size() for t in kept)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.states, self.seen = [{} for _ in self.states], 0

    def reorder_cache(self, beam_idx: Any) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        super().reorder_cache(beam_idx)
        self._on_states(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._on_keys("batch_select_indices", indices)
        self._on_states(lambda t: t[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        self._on_keys("batch_repeat_interleave", repeats)
        self._on_states(lambda t: t.repeat_interleave(repeats, 0))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Raises:
            ValueError: a layer keeps states, which have no past to go back to.
        """
        if any(self.states):
            raise ValueError("A recurrent state cannot be cropped; read the shorter text into a new SLMCache.")
        super().crop(tokens_to_remove)
        self.seen -= tokens_to_remove

    def _on_keys(self, method: str, argument: Any) -> None:
        for layer in self.layers:
            if not isinstance(layer, _NoKeys):
                getattr(layer, method)(argument)

    def _on_states(self, change: Callable[[Tensor], Tensor]) -> None:
        self.states = [{name: change(t) for name, t in state.items()} for state in self.states]


def _slot(kind: str, config: Any) -> CacheLayerMixin:
    if kind in _SLIDING:
        return DynamicSlidingWindowLayer(config.sliding_window)
    return DynamicLayer() if kind in _FULL else _NoKeys()


class StaticCache:
    """Buffers made once, for `lightning_slm.models.decode`: a sliding window is a ring, states are written in place.

    Args:
        config: an ``SLMConfig``.
        batch: rows.
        capacity: tokens that can be seen.
        dtype: of keys and values.
        device: where.
    """

    def __init__(self, config: Any, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.windowed = [kind in _SLIDING for kind in config.layer_types]
        self.meta_tokens = config.meta_tokens  # a window keeps them as states
        for kind in config.layer_types:
            size = min(config.sliding_window, capacity) if kind in _SLIDING else 0
            size = capacity + self.meta_tokens if kind in _FULL else size
            shape = (batch, config.num_key_value_heads, size, config.head_dim)
            self.keys.append(torch.zeros(shape, dtype=dtype, device=device))
            self.values.append(torch.zeros(shape, dtype=dtype, device=device))
        self.states: list[dict[str, Tensor]] = [{} for _ in config.layer_types]
        self.length = 0

    def update(self, k_BKTd: Tensor, v_BKTd: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Write the new ones; those to look at: all so far, in a ring in no order."""
        keys, values, T = self.keys[layer_idx], self.values[layer_idx], k_BKTd.shape[2]
        if values.shape[3] != v_BKTd.shape[3]:  # values may be wider than keys
            self.values[layer_idx] = values = values.new_zeros(*values.shape[:3], v_BKTd.shape[3])
        before = self.length + self.meta_tokens if self.length and not self.windowed[layer_idx] else self.length
        size, end = keys.shape[2], before + T
        if T > 1 and self.windowed[layer_idx]:  # the prompt: it looks at itself, the ring keeps its end
            slots = torch.arange(max(0, T - size), T, device=keys.device)
            keys[:, :, slots % size] = k_BKTd[:, :, slots]
            values[:, :, slots % size] = v_BKTd[:, :, slots]
            return k_BKTd, v_BKTd
        at = before % size
        keys[:, :, at : at + T] = k_BKTd
        values[:, :, at : at + T] = v_BKTd
        return keys[:, :, : min(end, size)], values[:, :, : min(end, size)]

    def state(self, layer_idx: int) -> dict[str, Tensor]:
        """As of an ``SLMCache``."""
        return self.states[layer_idx]

    def keep(self, layer_idx: int, state: dict[str, Tensor]) -> None:
        """As of an ``SLMCache``, in the same memory from the second call on."""
        write_states_(self.states[layer_idx], state)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen."""
        return self.length


def write_states_(kept: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Write states over those of the same name."""
    for name, value in new.items():
        if name in kept:
            kept[name].copy_(value)
        else:
            kept[name] = value.clone()
