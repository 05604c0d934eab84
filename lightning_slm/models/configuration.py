"""The configuration of the backbone: plain values, and a pattern of mixers."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from lightning_slm.models.pattern import BlockSpec, parse_pattern
from lightning_slm.models.registry import TOKEN_MIXERS


@strict
class SLMConfig(PreTrainedConfig):
    """Sizes of a model and the pattern it is stacked from.

    Args:
        vocab_size: rows of the embedding.
        hidden_size: model width.
        intermediate_size: width inside the channel mixers.
        num_attention_heads: query heads.
        num_key_value_heads: key-value heads; None: as many as query heads.
        head_dim: width of one head; None: hidden_size // num_attention_heads.
        pattern: the blocks, e.g. "attn/mlp*4", "(attn/mlp swa/mlp)*9", "attn/mlp@shared*22" (one mlp for all); the
            grammar is in ``lightning_slm.models.pattern``.
        repeat: how often each block is run in place, with the same weights (MobileLLM-LS: 2).
        max_position_embeddings: longest sequence.
        rope_theta: base of the rotary wavelengths.
        rms_norm_eps: added to the mean square in every norm.
        sliding_window: tokens that "swa" looks back at, its own included.
        tie_word_embeddings: whether the output head is the embedding.
        initializer_range: standard deviation of the initial weights.

    ``num_hidden_layers`` and ``layer_types`` follow from the pattern: one entry, and one cache slot, for each time a
    block is run.

    >>> SLMConfig(pattern="attn/mlp*3", repeat=2).num_hidden_layers
    6
    """

    model_type = "slm"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    pattern: str | list[str] = "attn/mlp*4"
    repeat: int = 1
    max_position_embeddings: int = 1024
    rope_theta: float | int = 10000.0
    rms_norm_eps: float = 1e-6
    sliding_window: int | None = None
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    num_hidden_layers: int | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self._divided("hidden_size", "num_attention_heads")
        self._divided("num_attention_heads", "num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs.")
        self._derive_layers()
        super().__post_init__(**kwargs)

    @property
    def blocks(self) -> list[BlockSpec]:
        """The blocks as stored; each is run ``repeat`` times."""
        return parse_pattern(self.pattern)

    def _derive_layers(self) -> None:
        if self.repeat < 1:
            raise ValueError(f"repeat={self.repeat} must be at least 1.")
        tokens = [block.token.name for block in self.blocks if block.token is not None]
        if len(tokens) < len(self.blocks):
            raise ValueError(f"pattern {self.pattern!r}: a decoder's block needs a token mixer; '-' stands for none.")
        if acausal := [name for name in tokens if not TOKEN_MIXERS[name].causal]:
            raise ValueError(f"pattern {self.pattern!r}: {acausal[0]!r} sees the future, so a decoder cannot use it.")
        types = [str(TOKEN_MIXERS[name].cache_type) for name in tokens for _ in range(self.repeat)]
        if self.num_hidden_layers not in (None, len(types)):
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers}, but pattern {self.pattern!r} with repeat={self.repeat} "
                f"makes {len(types)} layers; leave num_hidden_layers out and change the pattern."
            )
        if ("sliding_attention" in types) != (self.sliding_window is not None):
            raise ValueError(
                f"sliding_window={self.sliding_window} and pattern {self.pattern!r} contradict each other: a window is "
                "what 'swa' looks at; 'attn' looks at everything."
            )
        self.layer_types, self.num_hidden_layers = types, len(types)

    def _divided(self, whole: str, part: str) -> int:
        quotient, rest = divmod(getattr(self, whole), getattr(self, part))
        if rest:
            raise ValueError(f"{whole}={getattr(self, whole)} must be a multiple of {part}={getattr(self, part)}.")
        return quotient
