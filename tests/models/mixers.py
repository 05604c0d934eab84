"""Every mixer of the registry at tiny size, and how to build a model around it; what the mixers' tests share."""

# Shape letters: B = batch, T = tokens, V = vocabulary.

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_slm.models import SLMConfig, SLMForCausalLM

V = 61
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Tiny:
    """A pattern that shows a mixer, with the values of the configuration that it needs.

    Args:
        pattern: blocks.
        values: further arguments of ``SLMConfig``.
        flat_state: whether its cache stops growing with the text.
        packs: whether it keeps packed documents apart; False: it refuses them.
    """

    pattern: str
    values: dict[str, Any] = field(default_factory=dict)
    flat_state: bool = False
    packs: bool = True


RWKV = {"norm": "layer", "embedding_norm": True, "positions": "none", "tie_word_embeddings": False}
MAMBA2 = {"state_size": 8, "head_dim": 16, "groups": 2, "chunk": 5}
SHARED_QK = {"num_key_value_heads": 4}
WINDOW = {"sliding_window": 4}
RANK = {"dt_rank": 16}  # so that groups of 16 and 2:4 fit this matrix, too, as they do at real sizes
# Token mixers that decoders can use; the name is the registry's.
DECODERS = {
    "attn": Tiny("attn/mlp*2"),
    "swa": Tiny("swa/mlp*2", {"sliding_window": 4}, flat_state=True),
    "mamba": Tiny("mamba/mlp*2", {"mixers": {"mamba": RANK}}, flat_state=True),
    "hymba": Tiny("hymba/mlp*2", {"mixers": {"hymba": RANK}}),
    "hymba_reuse": Tiny("hymba/mlp hymba_reuse/mlp*2", {"mixers": {"hymba": RANK, "hymba_reuse": RANK}}),
    "hymba_swa": Tiny("hymba_swa/mlp*2", {"mixers": {"hymba_swa": RANK}, **WINDOW}, flat_state=True),
    "hymba_swa_reuse": Tiny(
        "hymba/mlp (hymba_swa/mlp hymba_swa_reuse/mlp)*2",
        {"mixers": dict.fromkeys(("hymba", "hymba_swa", "hymba_swa_reuse"), RANK), **WINDOW},
    ),
    "mamba2": Tiny("mamba2/mlp*2", {"mixers": {"mamba2": MAMBA2}}, flat_state=True),
    "linear_attention": Tiny("linear_attention/mlp*2", {"mixers": {"linear_attention": {"chunk": 5}}}, flat_state=True),
    "rwkv4": Tiny("rwkv4/rwkv4_ffn*2", {**RWKV, "mixers": {"rwkv4": {"attention_hidden_size": 64}}}, flat_state=True),
    "rwkv7": Tiny("rwkv7_first/rwkv7_ffn rwkv7/rwkv7_ffn", RWKV, flat_state=True),
    "rwkv7_first": Tiny("rwkv7_first/mlp", flat_state=True),
    "lsh": Tiny("lsh/mlp*2", {**SHARED_QK, "mixers": {"lsh": {"buckets": 4, "chunk": 4, "local": True}}}),
    "routing": Tiny("routing/mlp*2", {**SHARED_QK, "mixers": {"routing": {"clusters": 3, "window": 4}}}),
}
# The same behind meta tokens, which all of a text sees; the name tells the token mixer.
META = {
    "attn+meta": Tiny("attn/mlp*2", {"meta_tokens": 3}, packs=False),
    "swa+meta": Tiny("swa/mlp*2", {"meta_tokens": 3, **WINDOW}, flat_state=True, packs=False),
    "mamba+meta": Tiny("mamba/mlp*2", {"meta_tokens": 3}, flat_state=True, packs=False),
    "hymba+meta": Tiny("hymba/mlp hymba_reuse/mlp", {"meta_tokens": 3}, packs=False),
    "hymba_swa+meta": Tiny("hymba_swa/mlp*2", {"meta_tokens": 3, **WINDOW}, flat_state=True, packs=False),
    "hymba_swa_reuse+meta": Tiny(
        "hymba/mlp (hymba_swa/mlp hymba_swa_reuse/mlp)*2", {"meta_tokens": 3, **WINDOW}, packs=False
    ),
}
# Token mixers that encoders can use.
ENCODERS = {
    "attn": Tiny("attn/mlp*2"),
    "linear_attention": Tiny("linear_attention/mlp*2"),
    "linformer": Tiny("linformer/mlp*2", {"mixers": {"linformer": {"projected": 6}}}, packs=False),
    "nystrom": Tiny("nystrom/mlp*2", {"mixers": {"nystrom": {"landmarks": 4, "conv_size": 5}}}, packs=False),
    "longformer": Tiny("longformer/mlp*2", {"mixers": {"longformer": {"window": 4, "global_tokens": 2}}}),
    "lsh": Tiny("lsh/mlp*2", {**SHARED_QK, "mixers": {"lsh": {"chunk": 4}}}),
    "routing": Tiny("routing/mlp*2", {**SHARED_QK, "mixers": {"routing": {"clusters": 3}}}),
}
# Channel mixers, behind attention.
CHANNELS = {
    "mlp": Tiny("attn/mlp*2"),
    "smooth_mlp": Tiny("attn/smooth_mlp*2"),
    "moe": Tiny("attn/moe*2", {"mixers": {"moe": {"experts": 4}}}),
    "relu_mlp": Tiny("attn/relu_mlp*2"),
    "relu2_mlp": Tiny("attn/relu2_mlp*2"),
    "gelu_mlp": Tiny("attn/gelu_mlp*2"),
    "relu_glu": Tiny("attn/relu_glu*2"),
    "mobilebert_ffn": Tiny("attn/mobilebert_ffn*2", {"mixers": {"mobilebert_ffn": {"stack": 2, "bottleneck": 16}}}),
    "rwkv4_ffn": Tiny("attn/rwkv4_ffn*2"),
    "rwkv7_ffn": Tiny("attn/rwkv7_ffn*2"),
}


def config_of(tiny: Tiny, **values: Any) -> SLMConfig:
    # Large weights: with the usual small ones, early tokens hardly matter and a wrong mask would not show.
    common = {"vocab_size": V, "max_position_embeddings": 128, "initializer_range": 0.3, **SIZES}
    return SLMConfig(**{**common, "pattern": tiny.pattern, **tiny.values, **values})


def decoder(tiny: Tiny, **values: Any) -> SLMForCausalLM:
    """A decoder around the mixer, with random weights that all matter."""
    return SLMForCausalLM(config_of(tiny, **values)).eval()


def tokens(batch: int = 2, length: int = 13) -> Tensor:
    return torch.randint(1, V, (batch, length))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    """Logits here are of size 10, so this is near float32's own rounding."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
