"""Published configurations of decoders, each with its source and its exact number of parameters."""

from lightning_slm.models.hybrid_presets import HYBRIDS
from lightning_slm.models.preset import Preset

_LLAMA = {"vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
_BABY = {"vocab_size": 16000, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}


def _sizes(hidden: int, intermediate: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


# MobileLLM's config.json says untied, its code ties the embedding all the same (``share_embedding``).
_MOBILELLM_125M = {**_LLAMA, **_sizes(576, 1536, 9, 3), "pattern": "attn/mlp*30", "tie_word_embeddings": True}
_MOBILELLM_350M = {**_LLAMA, **_sizes(960, 2560, 15, 5), "pattern": "attn/mlp*32", "tie_word_embeddings": True}

PRESETS: dict[str, Preset] = {
    "slm-5m": Preset(
        {"vocab_size": 4096, **_sizes(256, 704, 4, 4), "pattern": "attn/mlp*5"},
        5_065_472,
        "ours: learns source code on two cores within minutes",
    ),
    "babyllama-58m": Preset(
        {**_BABY, **_sizes(512, 1024, 8, 8), "pattern": "attn/mlp*16"},
        58_343_936,
        "Timiryasov & Tastet 2023, https://arxiv.org/abs/2308.02019; github.com/timinar/BabyLlama",
    ),
    "babyllama2-345m": Preset(
        {**_BABY, **_sizes(960, 2560, 15, 5), "pattern": "attn/mlp*32"},
        345_355_200,
        "Tastet & Timiryasov 2024, https://arxiv.org/abs/2409.17312",
    ),
    "tinyllama-1.1b": Preset(
        {**_LLAMA, **_sizes(2048, 5632, 32, 4), "pattern": "attn/mlp*22"},
        1_100_048_384,
        "Zhang et al. 2024, https://arxiv.org/abs/2401.02385",
    ),
    "mobilellm-125m": Preset(_MOBILELLM_125M, 124_635_456, "Liu et al. 2024, https://arxiv.org/abs/2402.14905"),
    "mobilellm-350m": Preset(_MOBILELLM_350M, 345_355_200, "Liu et al. 2024, https://arxiv.org/abs/2402.14905"),
    "mobilellm-125m-ls": Preset(
        {**_MOBILELLM_125M, "repeat": 2},
        124_635_456,
        "Liu et al. 2024, https://arxiv.org/abs/2402.14905, section 2.3: immediate block-wise sharing",
    ),
    "mobilellm-350m-ls": Preset(
        {**_MOBILELLM_350M, "repeat": 2},
        345_355_200,
        "Liu et al. 2024, https://arxiv.org/abs/2402.14905, section 2.3: immediate block-wise sharing",
    ),
    "mobillama-0.5b": Preset(
        {**_LLAMA, **_sizes(2048, 5632, 32, 32), "pattern": "attn/mlp@shared*22"},
        534_865_920,
        "Thawakar et al. 2024, https://arxiv.org/abs/2402.16840: one feed-forward layer for all blocks",
    ),
    **HYBRIDS,
}
