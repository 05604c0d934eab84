"""Recurrent and hybrid decoders by name: published configurations, and small ones to train on two cores."""

from typing import Any

from lightning_slm.models.preset import Preset

# A state does not grow with the text, so the longest text is a matter of taste: a million tokens.
_ENDLESS = 2**20
_MAMBA = {"positions": "none", "rms_norm_eps": 1e-5, "max_position_embeddings": _ENDLESS}
_RWKV = {"positions": "none", "norm": "layer", "embedding_norm": True, "rms_norm_eps": 1e-5}
_5M = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4}
# One period of Jamba: attention once in eight layers, experts in every second.
_JAMBA = "mamba/mlp mamba/moe mamba/mlp mamba/moe attn/mlp mamba/moe mamba/mlp mamba/moe"

# Hymba: global attention in the first, the middle and the last block; every other window takes its neighbour's keys.
_PAIR = "hymba_swa/mlp hymba_swa_reuse/mlp"
_TRIPLE = f"{_PAIR} hymba_swa_reuse/mlp"


def _hymba(pattern: str, hidden: int, intermediate: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": 32001,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "pattern": pattern,
        "sliding_window": 1024,
        "meta_tokens": 128,
        "max_position_embeddings": 8192,
    }


def _mamba(name: str, layers: int, hidden: int, vocabulary: int) -> dict[str, Any]:
    return {**_MAMBA, "vocab_size": vocabulary, "hidden_size": hidden, "pattern": f"{name}/-*{layers}"}


def _rwkv4(layers: int, hidden: int) -> dict[str, Any]:
    sizes = {"vocab_size": 50277, "hidden_size": hidden, "intermediate_size": 4 * hidden}
    return {**_RWKV, **sizes, "pattern": f"rwkv4/rwkv4_ffn*{layers}", "tie_word_embeddings": False,
            "max_position_embeddings": _ENDLESS}  # fmt: skip


def _samba(pairs: int, hidden: int, intermediate: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "pattern": f"(mamba/mlp swa/mlp)*{pairs}",
        "sliding_window": 2048,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": _ENDLESS,
    }


_MAMBA_PAPER = "Gu & Dao 2023, https://arxiv.org/abs/2312.00752; state-spaces/mamba"
_MAMBA2_PAPER = "Dao & Gu 2024, https://arxiv.org/abs/2405.21060; state-spaces/mamba2"
_RWKV_PAPER = "Peng et al. 2023, https://arxiv.org/abs/2305.13048"
_RWKV7_PAPER = "Peng et al. 2025, https://arxiv.org/abs/2503.14456"
_SAMBA_PAPER = "Ren et al. 2024, https://arxiv.org/abs/2406.07522; github.com/microsoft/Samba"
_JAMBA_PAPER = "Lieber et al. 2024, https://arxiv.org/abs/2403.19887"
_HYMBA_PAPER = "Dong et al. 2024, https://arxiv.org/abs/2411.13676"
_MAMBAFORMER_PAPER = "Park et al. 2024, https://arxiv.org/abs/2402.04248"
_OURS = "ours, to train on two cores; the architecture is that of"

HYBRIDS: dict[str, Preset] = {
    "mamba-130m": Preset(_mamba("mamba", 24, 768, 50280), 129_135_360, _MAMBA_PAPER),
    "mamba-370m": Preset(_mamba("mamba", 48, 1024, 50280), 371_516_416, _MAMBA_PAPER),
    "mamba2-130m": Preset(_mamba("mamba2", 24, 768, 50288), 128_989_632, _MAMBA2_PAPER),
    "rwkv4-169m": Preset(_rwkv4(12, 768), 169_342_464, _RWKV_PAPER),
    "rwkv4-430m": Preset(_rwkv4(24, 1024), 430_397_440, _RWKV_PAPER),
    "samba-421m": Preset(_samba(6, 1536, 4096, 12), 421_793_280, _SAMBA_PAPER),
    "samba-1.3b": Preset(_samba(9, 2304, 6144, 18), 1_330_207_488, _SAMBA_PAPER),
    "hymba-125m": Preset(
        _hymba(f"hymba/mlp ({_PAIR})*5 hymba/mlp ({_PAIR})*4 {_TRIPLE} hymba/mlp", 512, 1664, 8, 4),
        129_944_064,
        f"{_HYMBA_PAPER}; sizes from memory of its appendix, which counts 125 million",
    ),
    "hymba-1.5b": Preset(
        _hymba(f"hymba/mlp ({_PAIR})*7 hymba/mlp {_TRIPLE} ({_PAIR})*6 hymba/mlp", 1600, 5504, 25, 5),
        1_522_797_824,
        _HYMBA_PAPER,
    ),
    "jamba-small": Preset(
        {
            **_MAMBA,
            "vocab_size": 32000,
            "hidden_size": 512,
            "intermediate_size": 1792,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "pattern": f"({_JAMBA})*2",
            "mixers": {"mamba": {"norms": True}, "moe": {"experts": 16, "top_k": 2, "normalize_topk": False}},
        },
        415_845_760,
        f"ours: the proportions of {_JAMBA_PAPER} at an eighth of the width and half of the depth",
    ),
    "mambaformer": Preset(
        {**_MAMBA, "vocab_size": 4096, "hidden_size": 128, "pattern": "mamba/- (attn/- mamba/-)*2"},
        1_005_568,
        _MAMBAFORMER_PAPER,
    ),
    "mamba-5m": Preset({**_5M, **_MAMBA, "pattern": "mamba/-*9"}, 4_990_976, f"{_OURS} {_MAMBA_PAPER}"),
    "mamba2-5m": Preset(
        {**_5M, **_MAMBA, "pattern": "mamba2/-*9", "mixers": {"mamba2": {"state_size": 64}}},
        4_937_048,
        f"{_OURS} {_MAMBA2_PAPER}",
    ),
    "rwkv4-5m": Preset(
        {**_5M, **_RWKV, "intermediate_size": 896, "pattern": "rwkv4/rwkv4_ffn*5"}, 4_995_840, f"{_OURS} {_RWKV_PAPER}"
    ),
    "rwkv7-5m": Preset(
        {**_5M, **_RWKV, "intermediate_size": 896, "pattern": "rwkv7_first/rwkv7_ffn rwkv7/rwkv7_ffn*4"},
        5_071_360,
        f"{_OURS} {_RWKV7_PAPER}",
    ),
    "linear-5m": Preset(
        {**_5M, "pattern": "linear_attention/mlp*5"},
        5_065_472,
        f"{_OURS} Katharopoulos et al. 2020, https://arxiv.org/abs/2006.16236",
    ),
    "samba-5m": Preset(
        {**_5M, "intermediate_size": 832, "pattern": "(mamba/mlp swa/mlp)*2", "sliding_window": 64},
        5_006_592,
        f"{_OURS} {_SAMBA_PAPER}",
    ),
    "jamba-5m": Preset(
        {
            **_5M,
            **_MAMBA,
            "hidden_size": 192,
            "intermediate_size": 192,
            "pattern": _JAMBA,
            "mixers": {"mamba": {"norms": True}, "moe": {"experts": 4, "normalize_topk": False}},
        },
        4_913_012,
        f"{_OURS} {_JAMBA_PAPER}",
    ),
    "hymba-5m": Preset(
        {
            **_5M,
            "intermediate_size": 544,
            "num_key_value_heads": 2,
            "pattern": f"hymba/mlp {_PAIR} hymba/mlp",
            "sliding_window": 64,
            "meta_tokens": 16,
        },
        5_038_528,
        f"{_OURS} {_HYMBA_PAPER}",
    ),
    "mambaformer-5m": Preset(
        {**_5M, **_MAMBA, "pattern": "mamba/- (attn/- mamba/-)*5"}, 4_988_928, f"{_OURS} {_MAMBAFORMER_PAPER}"
    ),
}
