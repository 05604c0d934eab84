"""Encoders by name: ours, and published ones as Hugging Face has them; ``parameters`` are those below the heads."""

from lightning_slm.models.preset import Preset

_SLM_5M = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "causal": False,
}
_TINYBERT = "Jiao et al. 2020, https://arxiv.org/abs/1909.10351"
_MOBILEBERT = "Sun et al. 2020, https://arxiv.org/abs/2004.02984"

ENCODERS: dict[str, Preset] = {
    "encoder-5m": Preset({**_SLM_5M, "pattern": "attn/mlp*5"}, 5_065_472, "ours: slm-5m, looking both ways"),
    "linformer-5m": Preset(
        {
            **_SLM_5M,
            "pattern": "linformer/mlp*5",
            "max_position_embeddings": 512,
            "mixers": {"linformer": {"projected": 64}},
        },
        5_393_152,
        "ours: encoder-5m with the attention of Wang et al. 2020, https://arxiv.org/abs/2006.04768",
    ),
    "nystrom-5m": Preset(
        {
            **_SLM_5M,
            "pattern": "nystrom/mlp*5",
            "mixers": {"nystrom": {"landmarks": 32, "conv_size": 33}},
        },
        5_071_252,
        "ours: encoder-5m with the attention of Xiong et al. 2021, https://arxiv.org/abs/2102.03902",
    ),
    "longformer-5m": Preset(
        {
            **_SLM_5M,
            "pattern": "longformer/mlp*5",
            "mixers": {"longformer": {"window": 64, "global_tokens": 1}},
        },
        6_057_472,
        "ours: encoder-5m with the attention of Beltagy et al. 2020, https://arxiv.org/abs/2004.05150",
    ),
    "bert-base": Preset(
        {"model_type": "bert"},
        109_482_240,
        "Devlin et al. 2019, https://arxiv.org/abs/1810.04805",
    ),
    "distilbert": Preset(
        {"model_type": "distilbert"},
        66_362_880,
        "Sanh et al. 2019, https://arxiv.org/abs/1910.01108: every second layer of BERT",
    ),
    "mobilebert": Preset({"model_type": "mobilebert"}, 24_844_544, _MOBILEBERT),
    "mobilebert-tiny": Preset(
        {"model_type": "mobilebert", "num_feedforward_networks": 2, "use_bottleneck_attention": True},
        17_330_432,
        f"{_MOBILEBERT}, section 4.2, as near as Hugging Face's options come to it",
    ),
    "tinybert-4": Preset(
        {
            "model_type": "bert",
            "num_hidden_layers": 4,
            "hidden_size": 312,
            "intermediate_size": 1200,
            "num_attention_heads": 12,
        },
        14_350_248,
        _TINYBERT,
    ),
    "tinybert-6": Preset({"model_type": "bert", "num_hidden_layers": 6}, 66_955_008, _TINYBERT),
}
