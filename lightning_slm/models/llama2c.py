"""Checkpoints and tokenizers of llama2.c (https://github.com/karpathy/llama2.c), such as the tiny story tellers."""

# Shape letters: L = layers, H = heads, D = model width, O = outputs.

from pathlib import Path
from struct import Struct

import torch
from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from lightning_slm.models.configuration import SLMConfig
from lightning_slm.models.modeling import SLMForCausalLM

_HEADER = Struct("<7i")  # width, inner width, layers, heads, key-value heads, vocabulary (negative: untied), context
_PIECE = Struct("<fi")  # score, bytes


def load_llama2c(path: str | Path) -> SLMForCausalLM:
    """The model in a llama2.c checkpoint, format version 0: seven integers, then every tensor in float32.

    Raises:
        ValueError: the file is not one, or is cut short.
    """
    data = Path(path).read_bytes()
    if len(data) < _HEADER.size:
        raise ValueError(f"{str(path)!r} is no llama2.c checkpoint: {len(data)} bytes hold no header.")
    width, inner, layers, heads, kv_heads, vocab, context = _HEADER.unpack_from(data)
    if min(width, inner, layers, heads, kv_heads, abs(vocab), context) < 1 or width % heads:
        raise ValueError(f"{str(path)!r} is no llama2.c checkpoint of version 0: its header makes no sense.")
    config = SLMConfig(
        vocab_size=abs(vocab),
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        pattern=f"attn/mlp*{layers}",
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=vocab > 0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = SLMForCausalLM(config)
    model.load_state_dict(_state_dict(data, config, path))
    return model.eval()


def _state_dict(data: bytes, config: PreTrainedConfig, path: str | Path) -> dict[str, Tensor]:
    tensors = _tensors(data, config, path)
    state = {f"model.{name}.weight": tensors[name] for name in ("embed_tokens", "norm")}
    state["lm_head.weight"] = tensors.get("lm_head", tensors["embed_tokens"])
    q, k = (_half_split(tensors[name], config.head_dim) for name in ("q", "k"))
    stacked = {
        "token_norm": tensors["token_norm"],
        "token_mixer.qkv_proj": torch.cat((q, k, tensors["v"]), 1),
        "token_mixer.o_proj": tensors["o"],
        "channel_norm": tensors["channel_norm"],
        "channel_mixer.gate_up_proj": torch.cat((tensors["gate"], tensors["up"]), 1),
        "channel_mixer.down_proj": tensors["down"],
    }
    for name, tensor_L in stacked.items():
        state |= {f"model.layers.{i}.{name}.weight": tensor for i, tensor in enumerate(tensor_L)}
    return state


def _tensors(data: bytes, config: PreTrainedConfig, path: str | Path) -> dict[str, Tensor]:
    """All tensors in file order; those of the layers stacked along their first axis."""
    L, D, inner = len(config.blocks), config.hidden_size, config.intermediate_size
    d, kv = config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {
        "embed_tokens": (config.vocab_size, D),
        "token_norm": (L, D), "q": (L, D, D), "k": (L, kv, D), "v": (L, kv, D), "o": (L, D, D),
        "channel_norm": (L, D), "gate": (L, inner, D), "down": (L, D, inner), "up": (L, inner, D),
        "norm": (D,),
        "cos": (config.max_position_embeddings, d // 2), "sin": (config.max_position_embeddings, d // 2),
    }  # fmt: skip
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (config.vocab_size, D)
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    if len(data) != (expected := _HEADER.size + 4 * sum(sizes)):
        raise ValueError(f"{str(path)!r} holds {len(data)} bytes, but its header asks for {expected}; is it whole?")
    values = torch.frombuffer(bytearray(data[_HEADER.size :]), dtype=torch.float32)
    return {name: part.view(shapes[name]) for name, part in zip(shapes, values.split(sizes))}


def _half_split(weight_LOD: Tensor, head_dim: int) -> Tensor:
    """llama2.c turns neighbouring outputs of a head (0, 1), (2, 3), ...; ours, as Hugging Face, (i, i + d/2)."""
    L, O, D = weight_LOD.shape
    return weight_LOD.view(L, O // head_dim, head_dim // 2, 2, D).transpose(2, 3).reshape(L, O, D)


def load_llama2c_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a llama2.c ``tok*.bin``: byte-pair merges in the order of their scores, bytes where none fit."""
    pieces = _pieces(Path(path).read_bytes())
    vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
    model = BPE(vocab, _merges(pieces, vocab), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def _pieces(data: bytes) -> list[tuple[str, float]]:
    """Pieces and their scores; the three special tokens under their usual names."""
    pieces, position = [], 4  # the first integer is the length of the longest piece
    while position < len(data):
        score, length = _PIECE.unpack_from(data, position)
        position += _PIECE.size + length
        pieces.append((data[position - length : position].decode().replace(" ", "▁"), score))
    return [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *pieces[3:]]


def _merges(pieces: list[tuple[str, float]], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others; the best-scored piece first."""
    merges = []
    for piece, _ in sorted(pieces[259:], key=lambda scored: -scored[1]):  # behind three specials and 256 bytes
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [(left, right) for left, right in splits if left in vocab and right in vocab]
    return merges
