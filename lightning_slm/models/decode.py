"""Decoding with static state: buffers made once, one token per step, nothing around it.

``model.generate()`` stays Hugging Face's, with beams and processors; this loop is for speed at a single sequence.
"""

# Shape letters: B = batch, T = tokens of this call, S = tokens the buffers hold, D = model width, V = vocabulary,
# K = key-value heads, d = head width.

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_slm.models.cache import StaticCache, write_states_
from lightning_slm.models.modeling import SLMForCausalLM
from lightning_slm.nn.mixer import Context


class Decoder(Protocol):
    """Feeds a model token by token; remembers what it has read."""

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Read these tokens; logits of the next one, (B, V)."""


@torch.inference_mode()
def generate_stream(
    model: nn.Module,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    compile: bool = False,
) -> Iterator[int]:
    """Continue one sequence, token by token.

    Args:
        model: ours, or any causal language model of ``transformers`` (through its own cache).
        input_ids: the prompt, (T,) or (1, T).
        max_new_tokens: how many at most.
        temperature: 0 takes the most probable token; otherwise logits are divided by it and drawn from.
        top_k: draw from the k most probable tokens.
        top_p: draw from the most probable tokens that together have this probability.
        eos_token_id: ends the sequence, and is yielded last.
        compile: run the step through ``torch.compile``: some ten seconds once, then faster. Ours only.

    Raises:
        ValueError: an empty prompt, more tokens than the model has positions for, or ``compile`` for a model
            that is not ours.
    """
    ids_1T = torch.as_tensor(input_ids).reshape(1, -1)
    if ids_1T.shape[1] == 0:
        raise ValueError("input_ids is empty; give at least one token, the one that begins texts for example.")
    was_training = model.training
    model.eval()
    try:
        read = make_decoder(model, 1, ids_1T.shape[1] + max_new_tokens, compile=compile)
        for _ in range(max_new_tokens):
            ids_1T = sample(read(ids_1T), temperature, top_k, top_p)
            token = int(ids_1T)
            yield token
            if token == eos_token_id:
                return
    finally:
        model.train(was_training)


def sample(logits_BV: Tensor, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """The next token of each sequence, (B, 1); the arguments are those of ``generate_stream``."""
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        smallest_B1 = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
    if top_p is not None:
        sorted_BV, order_BV = logits_BV.sort(descending=True)
        probs_BV = sorted_BV.softmax(-1)
        beyond_BV = probs_BV.cumsum(-1) - probs_BV > top_p  # what lies before it is enough already
        logits_BV = logits_BV.masked_fill(beyond_BV.scatter(1, order_BV, beyond_BV), -torch.inf)
    return torch.multinomial(logits_BV.softmax(-1), 1)


def make_decoder(model: nn.Module, batch: int, capacity: int, *, compile: bool = False) -> Decoder:
    """The fastest way to read tokens that ``model`` allows: static buffers for ours, otherwise its own cache.

    Args:
        batch: sequences, each of equal length.
        capacity: tokens of prompt and continuation together.
        compile: whether single tokens go through ``torch.compile``.
    """
    if isinstance(model, SLMForCausalLM):
        return (_CompiledDecoder if compile else _StaticDecoder)(model, batch, capacity)
    if compile:
        raise ValueError(f"compile=True needs an SLMForCausalLM, not {type(model).__name__}.")
    return _CacheDecoder(model)


class _CacheDecoder:
    """Any model that takes and returns ``past_key_values``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.cache: Any = None

    def __call__(self, ids_BT: Tensor) -> Tensor:
        out = self.model(input_ids=ids_BT, past_key_values=self.cache, use_cache=True)
        self.cache = getattr(out, "past_key_values", None)
        if self.cache is None:
            raise ValueError(f"{type(self.model).__name__} returns no past_key_values; it cannot decode by steps.")
        return out.logits[:, -1]


class _StaticDecoder:
    """Ours in eager mode: each step attends to views of the filled part of the buffers, without any mask."""

    def __init__(self, model: SLMForCausalLM, batch: int, capacity: int) -> None:
        if capacity > model.config.max_position_embeddings:
            raise ValueError(
                f"{capacity} tokens of prompt and continuation are more than max_position_embeddings="
                f"{model.config.max_position_embeddings}; lower max_new_tokens or shorten the prompt."
            )
        self.model, self.config = model, model.config
        # The norm is in the precision that blocks compute in, whatever embeddings are packed into.
        weight = model.model.norm.weight
        self.cache = StaticCache(self.config, batch, capacity, weight.dtype, weight.device)
        self.rope = model.model.rope(torch.arange(capacity, device=model.device)[None] + self.config.meta_tokens)

    def __call__(self, ids_BT: Tensor) -> Tensor:
        T = ids_BT.shape[1]
        logits_BV = self.step(ids_BT) if T == 1 and self.cache.length else self.prefill(ids_BT)
        self.cache.length += T
        return logits_BV

    def prefill(self, ids_BT: Tensor) -> Tensor:
        if self.cache.length:
            raise ValueError("a decoder reads its prompt once, then one token at a time; make a new one.")
        x_BTD = self.model.model.embed_tokens(ids_BT)
        context, positions = self.model.model.context(x_BTD)
        context.cache = self.cache
        return _logits_of_last(self.model, x_BTD, positions, context)

    def step(self, ids_B1: Tensor) -> Tensor:
        now = slice(self.cache.length, self.cache.length + 1)
        rope = None if self.rope is None else (self.rope[0][:, :, now], self.rope[1][:, :, now])
        position_11 = torch.full((1, 1), self.cache.length, device=ids_B1.device)
        x_B1D = self.model.model.embed_tokens(ids_B1)
        return _logits_of_last(self.model, x_B1D, position_11, Context(rope, cache=self.cache))


def _logits_of_last(model: SLMForCausalLM, x_BTD: Tensor, positions_BT: Tensor, context: Context) -> Tensor:
    x_BTD = model.model.run_blocks(model.model.enter(x_BTD, positions_BT, context), context)
    return model.lm_head(model.model.norm(x_BTD[:, -1]))


class _CompiledDecoder(_StaticDecoder):
    """Ours with a compiled step: the whole buffers under a mask, so that shapes never change.

    Buffers are rounded up to a power of two, so that prompts of other lengths do not compile anew.
    """

    def __init__(self, model: SLMForCausalLM, batch: int, capacity: int) -> None:
        longest = model.config.max_position_embeddings
        roomy = max(256, 1 << (capacity - 1).bit_length())
        super().__init__(model, batch, min(roomy, longest) if capacity <= longest else capacity)
        self.compiled = False

    def step(self, ids_B1: Tensor) -> Tensor:
        position_1 = torch.tensor([self.cache.length], device=ids_B1.device)
        cache = self.cache
        # Each model is compiled once more than the one before it, and those are not without end.
        with nullcontext() if self.compiled else torch._dynamo.utils.disable_cache_limit():
            self.compiled = True
            return _compiled_step()(self.model, cache.keys, cache.values, cache.states, ids_B1, position_1)


@cache
def _compiled_step() -> Callable[..., Tensor]:
    return torch.compile(_static_step, dynamic=False, fullgraph=True)


def _static_step(
    model: SLMForCausalLM,
    keys: list[Tensor],
    values: list[Tensor],
    states: list[dict[str, Tensor]],
    ids_B1: Tensor,
    position_1: Tensor,
) -> Tensor:
    kinds = {
        "full_attention": ("full_attention", "hybrid"),
        "sliding_attention": ("sliding_attention", "hybrid_sliding"),
    }
    masks: dict[str, Tensor | None] = {}
    behind_meta_1 = position_1 + model.config.meta_tokens
    slots = {"full_attention": behind_meta_1, "sliding_attention": position_1}  # a ring has no meta tokens
    for kind, types in kinds.items():
        sizes = [k.shape[2] for k, layer_type in zip(keys, model.config.layer_types) if layer_type in types]
        if sizes:  # a ring is full of what may be seen once it has been filled
            masks[kind] = (torch.arange(sizes[0], device=position_1.device) <= slots[kind])[None, None, None]
    of_layers = [position_1 if "sliding" in layer_type else behind_meta_1 for layer_type in model.config.layer_types]
    context = Context(model.model.rope(behind_meta_1[None]), masks, _IndexedCache(keys, values, states, of_layers))
    return _logits_of_last(model, model.model.embed_tokens(ids_B1), position_1[None], context)


class _IndexedCache:
    """The same buffers, written at positions that are tensors, one for each layer."""

    def __init__(
        self, keys: list[Tensor], values: list[Tensor], states: list[dict[str, Tensor]], positions: list[Tensor]
    ) -> None:
        self.keys, self.values, self.states, self.positions = keys, values, states, positions

    def update(self, k_BK1d: Tensor, v_BK1d: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        slot_1 = self.positions[layer_idx] % keys.shape[2]
        keys.index_copy_(2, slot_1, k_BK1d)
        values.index_copy_(2, slot_1, v_BK1d)
        return keys, values

    def state(self, layer_idx: int) -> dict[str, Tensor]:
        return self.states[layer_idx]

    def keep(self, layer_idx: int, state: dict[str, Tensor]) -> None:
        write_states_(self.states[layer_idx], state)
