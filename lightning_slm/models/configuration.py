"""The configuration of the backbone: plain values, and a pattern of mixers."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from lightning_slm.errors import near
from lightning_slm.models.pattern import BlockSpec, parse_pattern
from lightning_slm.models.registry import CHANNEL_MIXERS, TOKEN_MIXERS

_WINDOWED = ("sliding_attention", "hybrid_sliding")


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
        mixers: options of single mixers by their name in the pattern, e.g. {"mamba": {"state_size": 16}}; what there
            is, and the defaults, tells ``TOKEN_MIXERS["mamba"].options()``.
        repeat: how often each block is run in place, with the same weights (MobileLLM-LS: 2).
        causal: False for an encoder, whose tokens see what follows, too.
        positions: how attention learns of order: "rope", "learned" (an embedding of positions), or "none", for
            patterns whose other mixers tell it.
        norm: "rms" or "layer" (with a bias), before every mixer and at the end.
        embedding_norm: whether a norm follows the embedding, too (RWKV).
        reversible: two residual streams that can be computed back, so that training keeps the activations of no block
            (`lightning_slm.models.reversible`); not a drop-in for trained weights.
        meta_tokens: learned vectors that stand before every text and that all its tokens see, also beyond a window
            (Hymba: 128); 0: none. Decoders only.
        max_position_embeddings: longest sequence, not counting meta tokens.
        rope_theta: base of the rotary wavelengths.
        rms_norm_eps: added to the mean square in every norm.
        sliding_window: tokens that "swa" and other windowed mixers look back at, their own included.
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
    mixers: dict[str, dict[str, Any]] | None = None
    repeat: int = 1
    causal: bool = True
    positions: str = "rope"
    norm: str = "rms"
    embedding_norm: bool = False
    reversible: bool = False
    meta_tokens: int = 0
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
        self._one_of("positions", ("rope", "learned", "none"))
        self._one_of("norm", ("rms", "layer"))
        if self.meta_tokens < 0 or (self.meta_tokens and not self.causal):
            raise ValueError(f"meta_tokens={self.meta_tokens} must be 0, or more in a decoder (causal=True).")
        self._check_options()
        self._derive_layers()
        super().__post_init__(**kwargs)

    @property
    def blocks(self) -> list[BlockSpec]:
        """The blocks as stored; each is run ``repeat`` times."""
        return parse_pattern(self.pattern)

    def options(self, name: str) -> dict[str, Any]:
        """The options given for the mixer of this name."""
        return (self.mixers or {}).get(name, {})

    def _check_options(self) -> None:
        used = {s.name: r for b in self.blocks for s, r in ((b.token, TOKEN_MIXERS), (b.channel, CHANNEL_MIXERS)) if s}
        for name, options in (self.mixers or {}).items():
            if name not in used:
                raise ValueError(f"mixers: {name!r} is not in pattern {self.pattern!r}. {near(name, used)}")
            known = used[name][name].options()
            for option in options:
                if option not in known:
                    raise ValueError(f"mixers: {name!r} has no option {option!r}. {near(option, known)}")

    def _derive_layers(self) -> None:
        if self.repeat < 1:
            raise ValueError(f"repeat={self.repeat} must be at least 1.")
        tokens = [block.token.name for block in self.blocks if block.token is not None]
        if self.causal and len(tokens) < len(self.blocks):
            raise ValueError(f"pattern {self.pattern!r}: a decoder's block needs a token mixer; '-' stands for none.")
        for name in dict.fromkeys(tokens):
            mixer = TOKEN_MIXERS[name]
            if not (mixer.causal if self.causal else mixer.bidirectional):
                role = "a decoder (causal=True)" if self.causal else "an encoder (causal=False)"
                raise ValueError(f"pattern {self.pattern!r}: {name!r} cannot stand in {role}: {mixer.refusal}.")
        types = [str(TOKEN_MIXERS[name].cache_type or "full_attention") for name in tokens for _ in range(self.repeat)]
        if self.num_hidden_layers not in (None, len(types)):
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers}, but pattern {self.pattern!r} with repeat={self.repeat} "
                f"makes {len(types)} layers; leave num_hidden_layers out and change the pattern."
            )
        if bool(set(_WINDOWED) & set(types)) != (self.sliding_window is not None):
            raise ValueError(
                f"sliding_window={self.sliding_window} and pattern {self.pattern!r} contradict each other: a window is "
                "what 'swa' and its like look at; 'attn' looks at everything."
            )
        self.layer_types, self.num_hidden_layers = types, len(types)

    def _one_of(self, name: str, known: tuple[str, ...]) -> None:
        if getattr(self, name) not in known:
            raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, known))}.")

    def _divided(self, whole: str, part: str) -> int:
        quotient, rest = divmod(getattr(self, whole), getattr(self, part))
        if rest:
            raise ValueError(f"{whole}={getattr(self, whole)} must be a multiple of {part}={getattr(self, part)}.")
        return quotient
