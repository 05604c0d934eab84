"""The contract of a mixer: what a block is made of.

A block adds two mixers to the residual stream, each behind its own norm:

    x = x + token_mixer(norm(x))      mixes along the sequence: attention, a state-space scan, ...
    x = x + channel_mixer(norm(x))    mixes along the width: SwiGLU, experts, ...
"""

# Shape letters: B = batch, T = tokens of this call, S = tokens seen so far and now, D = model width, d = head width.

import inspect
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn


@dataclass(slots=True)
class Context:
    """What the layers of one forward pass of the model share beside the residual stream.

    One object lives through one forward pass, in layer order.

    Attributes:
        rope: cosine and sine of the positions' angles, each (B or 1, 1, T, d/2), in float32; None: no rotation.
        masks: attention mask by kind ("full_attention", "sliding_attention"), (B or 1, 1, T or 1, S): boolean
            (True = may look) or additive. None, or no entry: plain causal attention over this call's tokens, or a
            single token that may look at everything; in an encoder, everything.
        cache: keys and values (or states) of earlier calls, an ``SLMCache`` or what has its methods ``update``,
            ``state`` and ``keep``; None in training and in a plain forward.
        starts_BT: True where a text begins that must see nothing before it: a packed document, or the first token
            after padding on the left. Whatever carries a state resets it there. None: only at the beginning of rows.
        tokens_BS: False for padding, over all S tokens; None: there is none.
        causal: False in an encoder, where every token may see every other.
        meta: how many learned meta tokens this call has beside its own tokens; 0 in later calls of a cached text.
        meta_at_B: the position of each row's first meta token, behind padding; None: 0 in all rows.
        losses: what mixers add to the training loss, each a mean over this call's tokens and weighted (a router's).
        shared: what one layer leaves for later ones, under a name of its choice. A layer's entry is its own: with
            activation checkpointing it is written a second time, after later layers have read it.
    """

    rope: tuple[Tensor, Tensor] | None = None
    masks: dict[str, Tensor | None] = field(default_factory=dict)
    cache: Any = None
    starts_BT: Tensor | None = None
    tokens_BS: Tensor | None = None
    causal: bool = True
    meta: int = 0
    meta_at_B: Tensor | None = None
    losses: list[Tensor] = field(default_factory=list)
    shared: dict[str, Any] = field(default_factory=dict)

    def state(self, layer_idx: int) -> dict[str, Tensor]:
        """What `keep` kept for this layer in earlier calls; empty at the beginning and without a cache, or with one of
        transformers' own, which hold keys and values only.
        """
        return self.cache.state(layer_idx) if hasattr(self.cache, "state") else {}

    def keep(self, layer_idx: int, **state: Tensor) -> None:
        """Keep tensors, batch first, for the next call; without a cache nothing happens.

        Both mixers of a block share one slot, so that names must differ. Shapes stay the same from call to call.
        """
        if self.cache is not None:
            self.cache.keep(layer_idx, state)

    @property
    def segments_BT(self) -> Tensor | None:
        """The number of each token's text within its row: two tokens see each other if theirs are equal."""
        return None if self.starts_BT is None else self.starts_BT.cumsum(-1)


class Mixer(nn.Module):
    """Base of token mixers and channel mixers: (B, T, D) in, (B, T, D) out, without residual and norm.

    A new one is a file here and a line in ``lightning_slm/models/registry.py``. It keeps these promises:

    - ``from_config(config, **options)`` builds it from an ``SLMConfig``: common sizes are the configuration's fields,
      what only this mixer knows are keyword-only options with defaults (``SLMConfig(mixers={name: options})``). It
      raises ``ValueError`` for sizes that do not fit.
    - ``forward(x_BTD, context, layer_idx)`` also continues from ``context.cache`` where one is given: keys and values
      by ``cache.update``, other states by ``context.state`` and ``context.keep``. ``layer_idx`` counts *virtual*
      layers: a shared or repeated mixer is one object called with several of them, so it keeps no state of its own.
    - ``causal``: can stand in a decoder: the output at position t depends on nothing after t. ``bidirectional``: can
      stand in an encoder: with ``context.causal`` False, every position may see every other, and padding
      (``context.tokens_BS``) changes nothing. ``refusal`` says why, where one of them is False.
    - ``cache_type``: the kind of slot it needs, one of transformers' layer types: keys and values ("full_attention",
      "sliding_attention"), states ("linear_attention"), or both ("hybrid", "hybrid_sliding"). None: neither.
    - ``init_weights_(config)``, where the model's rule (normal with ``initializer_range``, zero biases, norms of one)
      does not fit: sets the parameters that this very module holds, by `set_`. Any module inside a mixer may have it.

    Parameters that compression must not touch are named in ``_slm_protected`` (see ``lightning_slm.nn.targets``);
    those that must not decay carry ``_no_weight_decay = True``.
    """

    causal: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = False
    refusal: ClassVar[str] = "it reads from left to right only"
    cache_type: ClassVar[str | None] = None

    @classmethod
    def from_config(cls, config: Any) -> Self:
        raise NotImplementedError(f"{cls.__name__}.from_config")

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The names of ``from_config``'s options, and their defaults."""
        parameters = inspect.signature(cls.from_config).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """Linear layers that are several stacked along their outputs: name -> rows of each part, in order.

        For whoever needs the parts: converters to other formats, optimizers that treat whole matrices.
        """
        return {}

    def flops_per_token(self, context: int) -> int | None:
        """Floating-point operations of the forward pass of one token that attends to ``context`` tokens, all told.

        None: counted from what it holds, see `lightning_slm.measure.flops_per_token`, which knows weight matrices,
        attention and the usual recurrences. A mixer that costs anything else says so here.
        """
        return None


def set_(parameter: Tensor, values: Tensor | float) -> None:
    """Give a parameter its first values, unless a checkpoint has given it some (transformers marks those)."""
    if not getattr(parameter, "_is_hf_initialized", False):
        with torch.no_grad():
            parameter.copy_(torch.as_tensor(values))
