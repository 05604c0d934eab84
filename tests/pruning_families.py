"""A small model of every family whose structure is known, with random weights everywhere; what its tests share.

Letters: B = batch, T = tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lightning_slm.models import SLMConfig, SLMForCausalLM, SLMForMaskedLM, SLMForSequenceClassification
from lightning_slm.pruning import structure_of

VOCABULARY, LAYERS, WIDTH, FFN = 96, 3, 64, 128
_HF = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
}  # fmt: skip
_SLM = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": FFN, "num_attention_heads": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
_NO_ENDS = {"bos_token_id": None, "eos_token_id": None}
_HYBRID = {"mamba": {"state_size": 4}, "mamba2": {"head_dim": 16, "state_size": 8}}


def _slm(pattern: str, kind: Any = SLMForCausalLM, **values: Any) -> Callable[[], nn.Module]:
    return lambda: kind(SLMConfig(**_SLM, pattern=pattern, **values))


def _hf(name: str, config: str, **values: Any) -> Callable[[], nn.Module]:
    kind: Any = getattr(transformers, name)
    return lambda: kind(getattr(transformers, config)(**{**_HF, **values}))


def _gpt2(name: str, **values: Any) -> Callable[[], nn.Module]:
    sizes = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_head": 8, "n_layer": LAYERS, "n_positions": 64, **_NO_ENDS}
    kind: Any = getattr(transformers, name)
    return lambda: kind(transformers.GPT2Config(**{**sizes, **values}))


HF: dict[str, Callable[[], nn.Module]] = {
    "llama": _hf("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=4),
    "llama tied": _hf("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=True),
    "llama biases": _hf("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "llama classifier": _hf("LlamaForSequenceClassification", "LlamaConfig", num_key_value_heads=4, pad_token_id=0),
    "mistral": _hf("MistralForCausalLM", "MistralConfig", num_key_value_heads=4, sliding_window=4),
    "qwen2": _hf(
        "Qwen2ForCausalLM", "Qwen2Config", num_key_value_heads=4, use_sliding_window=True, sliding_window=4,
        max_window_layers=1,
    ),
    "qwen3": _hf("Qwen3ForCausalLM", "Qwen3Config", num_key_value_heads=4, head_dim=16),
    "gpt2": _gpt2("GPT2LMHeadModel"),
    "gpt2 classifier": _gpt2("GPT2ForSequenceClassification", pad_token_id=0),
    "bert": _hf("BertModel", "BertConfig"),
    "bert masked": _hf("BertForMaskedLM", "BertConfig"),
    "bert classifier": _hf("BertForSequenceClassification", "BertConfig", num_labels=3),
}  # fmt: skip
OURS: dict[str, Callable[[], nn.Module]] = {
    "slm": _slm("attn/mlp*3"),
    "slm untied": _slm("attn/relu2_mlp*3", tie_word_embeddings=False),
    "slm windows": _slm("attn/relu_mlp swa/relu_glu swa/smooth_mlp", sliding_window=4),
    "slm shared": _slm("attn/mlp@one*3", repeat=2, positions="learned", norm="layer", embedding_norm=True),
    "slm hybrid": _slm("mamba/mlp attn/mobilebert_ffn mamba2/mlp", mixers=_HYBRID),
    "slm masked": _slm("attn/gelu_mlp*3", SLMForMaskedLM, causal=False, norm="layer", positions="learned"),
    "slm classifier": _slm("attn/gelu_mlp*3", SLMForSequenceClassification, causal=False, num_labels=3),
}
FAMILIES = {**HF, **OURS}
# Their configurations have no head width: heads and channels go together.
TIED_WIDTHS = [name for name in HF if name.startswith(("gpt2", "bert"))]


def family(name: str) -> Any:
    """In evaluation mode, with weights so large that every unit counts."""
    model = FAMILIES[name]().eval()
    for p in model.parameters():
        p.data.copy_(torch.randn_like(p) * 0.2 if p.ndim > 1 else p + torch.randn_like(p) * 0.2)
    return model


def tokens(B: int = 2, T: int = 10) -> Tensor:
    return torch.randint(1, VOCABULARY, (B, T))


def answer(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Logits; of a model without head, what the pooler says."""
    with torch.no_grad():
        output = model(ids_BT)
    return output.logits if hasattr(output, "logits") else output.pooler_output


def some(size: int, count: int, runs: int = 1) -> Tensor:
    """A mask of ``count`` units, as many in each run."""
    mask = torch.zeros(runs, size // runs, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(len(row))[: count // runs]] = True
    return mask.flatten()


def keeps(model: nn.Module, units: Sequence[str]) -> dict[str, Tensor]:
    """Half of every unit at random (two of three layers); of query heads, half of each kept run."""
    count = {"head": 4, "kv_group": 2, "ffn": 50, "hidden": 32, "layer": 2}
    groups = structure_of(model, units)
    return {g.name: some(g.size, 4 if g.size == 8 and g.unit == "kv_group" else count[g.unit], g.runs) for g in groups}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal to ``tolerance`` of the largest entry: float32, whose sums were taken in another order."""
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())
