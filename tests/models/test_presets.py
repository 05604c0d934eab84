"""Every preset has exactly the published number of parameters, and every way to name a model leads to one."""

import re

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_slm.models import PRESETS, SLMConfig, SLMForCausalLM, load_causal_lm
from lightning_slm.nn.targets import weight_targets

# Table 1.3 of the survey of architectures, in millions; the exact figures stand in the presets.
MILLIONS = {
    "slm-5m": 5.07, "babyllama-58m": 58.34, "babyllama2-345m": 345.36, "tinyllama-1.1b": 1100.05,
    "mobilellm-125m": 124.64, "mobilellm-350m": 345.36, "mobilellm-125m-ls": 124.64, "mobilellm-350m-ls": 345.36,
    "mobillama-0.5b": 534.9, "mamba-130m": 129.1, "mamba-370m": 371.5, "mamba2-130m": 129.0, "rwkv4-169m": 169.3,
    "rwkv4-430m": 430.4, "samba-421m": 421.8, "samba-1.3b": 1330.2, "hymba-1.5b": 1522.8,
}  # fmt: skip
TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "pattern": "attn/mlp*2"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_its_published_number_of_parameters(name):
    preset = PRESETS[name]
    with torch.device("meta"):
        model = SLMForCausalLM(preset.build_config())
    count = sum(p.numel() for p in model.parameters())
    assert count == preset.parameters
    if name in MILLIONS:
        assert abs(count / 1e6 - MILLIONS[name]) <= 0.05
    elif name.endswith("-5m"):  # comparable with each other
        assert abs(count / 5e6 - 1) < 0.02
    assert "http" in preset.source or name.startswith("slm-")


@pytest.mark.parametrize(
    "name", ["babyllama-58m", "babyllama2-345m", "tinyllama-1.1b", "mobilellm-125m", "mobilellm-350m"]
)
def test_a_llama_of_the_same_sizes_has_as_many_parameters(name):
    from lightning_slm.models.convert import to_llama_config

    with torch.device("meta"):
        theirs = LlamaForCausalLM(to_llama_config(PRESETS[name].build_config()))
    assert theirs.num_parameters() == PRESETS[name].parameters


def test_layer_sharing_doubles_the_depth_and_not_the_weights():
    plain, shared = PRESETS["mobilellm-125m"].build_config(), PRESETS["mobilellm-125m-ls"].build_config()
    assert (plain.num_hidden_layers, shared.num_hidden_layers) == (30, 60)
    assert PRESETS["mobilellm-125m"].parameters == PRESETS["mobilellm-125m-ls"].parameters


@pytest.mark.parametrize("name", PRESETS)
def test_quantisation_groups_of_32_fit_every_preset(name):
    with torch.device("meta"):
        model = SLMForCausalLM(PRESETS[name].build_config())
    layers = {t.name: t.weight.shape[1] for t in weight_targets(model) if isinstance(t.module, nn.Linear)}
    odd = {layer: width for layer, width in layers.items() if width % 32}
    assert all(re.search("dt_proj|lora|_down|_up", layer) for layer in odd), odd  # of low rank: left as they are


def test_a_preset_loads_by_name_with_single_values_replaced():
    model = load_causal_lm("slm-5m", pattern="attn/mlp", vocab_size=100)
    assert (model.config.num_hidden_layers, model.config.vocab_size, model.config.hidden_size) == (1, 100, 256)


@pytest.mark.parametrize("source", [TINY, {**TINY, "model_type": "slm"}, SLMConfig(**TINY)])
def test_a_configuration_or_its_dict_makes_a_new_model(source):
    model = load_causal_lm(source, pattern="attn/mlp*3")
    assert isinstance(model, SLMForCausalLM)
    assert model.config.num_hidden_layers == 3
    assert model.config.hidden_size == 32


def test_other_configurations_make_their_own_models():
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
    }
    assert type(load_causal_lm({"model_type": "llama", **sizes})) is LlamaForCausalLM
    assert type(load_causal_lm(LlamaConfig(**sizes), num_hidden_layers=2)) is LlamaForCausalLM


def test_a_module_comes_back_as_it_is():
    module = nn.Linear(2, 2)
    assert load_causal_lm(module) is module
    with pytest.raises(ValueError, match=r"weights already.*'vocab_size'"):
        load_causal_lm(module, vocab_size=3)


def test_a_folder_loads_with_its_weights(tmp_path):
    model = load_causal_lm(TINY)
    model.save_pretrained(tmp_path)
    again = load_causal_lm(tmp_path)
    assert torch.equal(
        again.model.layers[1].channel_mixer.down_proj.weight, model.model.layers[1].channel_mixer.down_proj.weight
    )
    with pytest.raises(ValueError, match="cannot be changed"):
        load_causal_lm(tmp_path, hidden_size=64)


def test_an_unknown_name_lists_near_ones():
    with pytest.raises(ValueError, match=r"'mobilelm-125m' is neither.*'mobilellm-125m'"):
        load_causal_lm("mobilelm-125m")
