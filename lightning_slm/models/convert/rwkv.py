"""From Hugging Face's RWKV-4, and from RWKV-7 in the files of rwkv.cpp (https://github.com/RWKV/rwkv.cpp)."""

# Shape letters: D = model width.

from pathlib import Path
from struct import Struct, error
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lightning_slm.models.configuration import SLMConfig
from lightning_slm.models.convert import common
from lightning_slm.models.modeling import SLMForCausalLM

_EPS = 1e-5
# Every RWKV so far.
_SHELL: dict[str, Any] = {"norm": "layer", "embedding_norm": True, "positions": "none", "rms_norm_eps": _EPS}
_NORMS = {"token_norm": "ln1", "channel_norm": "ln2"}
# Ours outside of the blocks -> Hugging Face's.
_OUTSIDE = {
    "model.embed_tokens": "rwkv.embeddings",
    "model.embed_norm": "rwkv.blocks.0.pre_ln",
    "model.norm": "rwkv.ln_out",
    "lm_head": "head",
}


def from_rwkv_config(theirs: PreTrainedConfig) -> SLMConfig:
    """The configuration of Hugging Face's ``RwkvForCausalLM``."""
    if theirs.layer_norm_epsilon != _EPS:
        raise ValueError(
            f"from_hf: layer_norm_epsilon={theirs.layer_norm_epsilon} holds for the norms of RWKV's blocks only, and "
            f"{_EPS} for the last one; ours has one for all, so it must be {_EPS}."
        )
    return SLMConfig(
        **common.same_values(theirs, "intermediate_size", "max_position_embeddings"),
        **_SHELL,
        pattern=f"rwkv4/rwkv4_ffn*{theirs.num_hidden_layers}",
        mixers={"rwkv4": {"attention_hidden_size": theirs.attention_hidden_size}},
        num_attention_heads=1,  # it has none, and any number fits
    )


def rwkv_names(name: str, config: SLMConfig) -> list[str]:
    """Hugging Face's parameter that one of ours is."""
    module, _, attribute = name.rpartition(".")
    if module in _OUTSIDE:
        return [f"{_OUTSIDE[module]}.{attribute}"]
    index, _, inside = name.removeprefix("model.layers.").partition(".")
    part, _, rest = inside.partition(".")
    parts = {**_NORMS, "token_mixer": "attention", "channel_mixer": "feed_forward"}
    return [f"rwkv.blocks.{index}.{parts[part]}.{rest}"]


def rwkv_weights(theirs: Any) -> dict[str, Tensor]:
    """Its weights as they were trained: after a pass in evaluation mode, Hugging Face's model has halved those that
    write to the residual stream, once more every ``rescale_every`` layers, and halves the stream in turn.
    """
    weights = dict(theirs.state_dict())
    if theirs.rwkv.layers_are_rescaled:
        every = theirs.config.rescale_every
        for i in range(theirs.config.num_hidden_layers if every > 0 else 0):
            for name in ("attention.output", "feed_forward.value"):
                weights[f"rwkv.blocks.{i}.{name}.weight"] = weights[f"rwkv.blocks.{i}.{name}.weight"] * 2 ** (
                    i // every
                )
    return weights


_MAGIC, _VERSION, _FLOAT32 = 0x67676D66, 101, 0
_HEADER = Struct("<6i")  # magic, version, vocabulary, width, layers, type of the weights
_TENSOR = Struct("<3i")  # axes, bytes of the name, type; the sizes of the axes follow, the last axis first
_HEAD_SIZE = 64
# Ours within a block -> rwkv.cpp's; vectors have the same names in both.
_LAYER = {
    **_NORMS,
    "token_mixer.norm": "att.ln_x",
    **{f"token_mixer.{name}": f"att.{name}" for name in ("receptance", "key", "value", "output")},
    "channel_mixer.key": "ffn.key",
    "channel_mixer.value": "ffn.value",
}
_LOW_RANK = {"decay": "w", "rate": "a", "value_share": "v", "gate": "g"}
_MIXES = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")


def from_rwkv_cpp(path: str | Path) -> SLMForCausalLM:
    """The RWKV-7 in a file of rwkv.cpp whose weights are float32.

    Raises:
        ValueError: the file is not one, is cut short, is quantised, or holds another version of RWKV.
    """
    tensors = _read(path)
    if "blocks.0.att.r_k" not in tensors:
        raise ValueError(f"{str(path)!r} holds another RWKV than version 7.")
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    V, D = tensors["emb.weight"].shape
    ranks = {f"{ours}_rank": len(tensors[f"blocks.0.att.{name}1"]) for ours, name in _LOW_RANK.items() if name != "v"}
    mixers = {"rwkv7_first": ranks}
    pattern = "rwkv7_first/rwkv7_ffn"
    if layers > 1:
        mixers["rwkv7"] = {**ranks, "value_rank": len(tensors["blocks.1.att.v1"])}
        pattern += f" rwkv7/rwkv7_ffn*{layers - 1}"
    config = SLMConfig(
        **_SHELL,
        vocab_size=V,
        hidden_size=D,
        intermediate_size=len(tensors["blocks.0.ffn.key.weight"]),
        num_attention_heads=D // _HEAD_SIZE,
        pattern=pattern,
        mixers=mixers,
        tie_word_embeddings=False,
        max_position_embeddings=common.ANY_LENGTH,
    )
    model = SLMForCausalLM(config)
    state = model.state_dict()
    model.load_state_dict({name: _tensor(name, tensors).view(p.shape) for name, p in state.items()})
    return model.eval()


def _tensor(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """The one of rwkv.cpp that is called ``name`` in ours."""
    outside = {
        "model.embed_tokens": "emb",
        "model.embed_norm": "blocks.0.ln0",
        "model.norm": "ln_out",
        "lm_head": "head",
    }
    module, _, attribute = name.rpartition(".")
    if module in outside:
        return tensors[f"{outside[module]}.{attribute}"]
    index, _, inside = name.removeprefix("model.layers.").partition(".")
    part, _, attribute = inside.rpartition(".")
    if part in _LAYER:
        return tensors[f"blocks.{index}.{_LAYER[part]}.{attribute}"]
    mixer, *rest = part.split(".")
    if rest:  # a low-rank pair
        return tensors[f"blocks.{index}.att.{_LOW_RANK[rest[0]]}{'1' if rest[1] == 'down' else '2'}"]
    if mixer == "token_mixer" and attribute in _MIXES:
        return tensors[f"blocks.{index}.att.x_rwkvag"][_MIXES.index(attribute)]
    return tensors[f"blocks.{index}.{'att' if mixer == 'token_mixer' else 'ffn'}.{attribute}"]


def _read(path: str | Path) -> dict[str, Tensor]:
    data, tensors = bytearray(Path(path).read_bytes()), {}
    try:
        magic, version, *_, kind = _HEADER.unpack_from(data)
        if (magic, version) != (_MAGIC, _VERSION) or kind != _FLOAT32:
            raise ValueError(f"{str(path)!r} is no file of rwkv.cpp, version {_VERSION}, with float32 weights.")
        at = _HEADER.size
        while at < len(data):
            axes, letters, kind = _TENSOR.unpack_from(data, at)
            sizes = Struct(f"<{axes}i").unpack_from(data, at + _TENSOR.size)[::-1]
            at += _TENSOR.size + 4 * axes
            name, at = data[at : at + letters].decode(), at + letters
            count = torch.Size(sizes).numel()
            if at + 4 * count > len(data):
                raise error(f"{name!r} ends after the file")
            tensors[name] = torch.frombuffer(data, dtype=torch.float32, count=count, offset=at).view(sizes).clone()
            at += 4 * count
    except (error, UnicodeDecodeError) as problem:
        raise ValueError(f"{str(path)!r} is no file of rwkv.cpp, or is cut short: {problem}.") from None
    return tensors
