"""The contract of a mixer: what a block is made of.

A block adds two mixers to the residual stream, each behind its own norm:

    x = x + token_mixer(norm(x))      mixes along the sequence: attention, a state-space scan, ...
    x = x + channel_mixer(norm(x))    mixes along the width: SwiGLU, experts, ...
"""

# Shape letters: B = batch, T = tokens of this call, S = tokens seen so far and now, D = model width, d = head width.

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor, nn


@dataclass(slots=True)
class Context:
    """What the layers of one forward pass of the model share beside the residual stream.

    One object lives through one forward pass, in layer order; a mixer with an output beside its tensor (keys and
    values for a later layer, a router's loss) adds a field here for it.

    Attributes:
        rope: cosine and sine of the positions' angles, each (B or 1, 1, T, d/2), in float32.
        masks: attention mask by cache type, (B or 1, 1, T, S): boolean (True = may look) or additive. None: plain
            causal attention over this call's tokens, or a single token that may look at everything.
        cache: keys and values (or states) of earlier calls, with ``transformers.Cache``'s ``update`` methods; None
            in training and in a plain forward.
    """

    rope: tuple[Tensor, Tensor]
    masks: dict[str, Tensor | None] = field(default_factory=dict)
    cache: Any = None


class Mixer(nn.Module):
    """Base of token mixers and channel mixers: (B, T, D) in, (B, T, D) out, without residual and norm.

    A new one is a file here and a line in ``lightning_slm/models/registry.py``. It keeps four promises:

    - ``from_config(config)`` builds it from an ``SLMConfig``; what it needs beyond the present fields becomes a
      field there. It raises ``ValueError`` for sizes that do not fit.
    - ``forward(x_BTD, context, layer_idx)`` also continues from ``context.cache`` where one is given: its state for
      this call lies in the cache's slot ``layer_idx``. ``layer_idx`` counts *virtual* layers: a shared or repeated
      mixer is one object called with several of them, so it keeps no state of its own.
    - ``causal``: the output at position t depends on nothing after t. False makes decoders refuse it.
    - ``cache_type``: the kind of slot it needs, one of transformers' layer types ("full_attention",
      "sliding_attention", "linear_attention", "hybrid", ...), also the key of its mask in ``context.masks``.
      None: no state.

    Parameters that compression must not touch are named in ``_slm_protected`` (see ``lightning_slm.nn.targets``).
    """

    causal: ClassVar[bool] = True
    cache_type: ClassVar[str | None] = None

    @classmethod
    def from_config(cls, config: Any) -> Self:
        raise NotImplementedError(f"{cls.__name__}.from_config")

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
