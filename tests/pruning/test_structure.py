"""Which units a model has, against counting by hand and against the same weights in another layout."""

import lightning.pytorch as pl
import pytest
import torch
import transformers
from pruning_families import FAMILIES, family
from support import Demo, ForeignLlama, on_two_ranks, tiny_llama, tiny_slm
from torch import nn

from lightning_slm.models import SLMConfig, SLMForCausalLM
from lightning_slm.pruning import shape_of, structure_of

UNITS = ["head", "kv_group", "ffn", "hidden", "layer"]


def by_name(model, units=UNITS):
    return {group.name: group for group in structure_of(model, units)}


def ones(part):
    return torch.ones_like(part.parameter)


def test_groups_are_named_by_what_they_are_in():
    llama = by_name(family("llama"))
    names = [
        f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn/head", "self_attn/kv_group", "mlp/ffn")
    ]
    assert list(llama) == [*names, "hidden", "layer"]
    assert [(g.size, g.layer, g.runs) for g in llama.values()][:4] == [(8, 0, 4), (4, 0, 1), (128, 0, 1), (8, 1, 4)]
    assert (llama["hidden"].size, llama["hidden"].layer, llama["layer"].size) == (64, None, 3)


def test_a_unit_of_a_llama_has_as_many_weights_as_by_hand():
    groups = by_name(family("llama biases"))
    D, d = 64, 8
    expected = {
        "model.layers.1.self_attn/head": (D * d + d) + d * D,  # q with bias, o
        "model.layers.1.self_attn/kv_group": 2 * (D * d + d) + 2 * (D * d + d) + 2 * d * D,  # two q, k, v, two o
        "model.layers.1.mlp/ffn": 2 * (D + 1) + D,
        # embedding and head; each layer: two norms, inputs of q, k, v, gate, up, outputs of o and down; the last norm
        "hidden": 2 * 96 + 3 * (2 + (64 + 32 + 32 + 128 + 128) + (64 + 1) + (128 + 1)) + 1,
    }
    for name, count in expected.items():
        assert groups[name].sums(ones).tolist() == [count] * groups[name].size, name
    per_layer = sum(p.numel() for p in family("llama biases").model.layers[0].parameters())
    assert groups["layer"].sums(ones).tolist() == [per_layer] * 3


def test_fused_matrices_have_the_units_of_the_same_model_with_matrices_of_their_own():
    ours = family("slm")
    theirs = ours.to_hf()
    a, b = structure_of(ours, UNITS), structure_of(theirs, UNITS)
    assert [(g.unit, g.size, g.layer, g.runs) for g in a] == [(g.unit, g.size, g.layer, g.runs) for g in b]
    for x, y in zip(a, b):
        one, other = (g.sums(lambda part: part.parameter.detach() ** 3) for g in (x, y))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_head_of_gpt2_is_three_slices_of_one_matrix():
    model = family("gpt2")
    group = by_name(model)["transformer.h.1.attn/head"]
    attention = model.transformer.h[1].attn
    w = attention.c_attn.weight.detach().view(64, 3, 8, 8)
    b = attention.c_attn.bias.detach().view(3, 8, 8)
    o = attention.c_proj.weight.detach().view(8, 8, 64)
    by_hand = w.square().sum((0, 1, 3)) + b.square().sum((0, 2)) + o.square().sum((1, 2))
    torch.testing.assert_close(group.sums(lambda part: part.parameter.detach().square()), by_hand)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_axis_of_a_parameter_is_in_a_group_once(name):
    for group in structure_of(family(name), UNITS):
        places = [(id(part.parameter), part.dim, part.offset, part.unit) for part in group.parts]
        assert len(places) == len(set(places)), group.name


def test_a_tied_embedding_counts_once():
    tied, untied = tiny_llama(tied=True), tiny_llama(tied=False)
    one, two = (by_name(model, "hidden")["hidden"].sums(ones) for model in (tied, untied))
    assert (two - one).tolist() == [96.0] * 64


def test_what_several_blocks_share_is_one_group():
    groups = by_name(family("slm shared"))
    assert groups["model.shared.mlp@one/ffn"].layer is None
    assert [name for name in groups if name.endswith("/ffn")] == ["model.shared.mlp@one/ffn"]


def test_parts_can_be_left_out_of_a_score():
    group = by_name(tiny_llama(), "ffn")["model.layers.0.mlp/ffn"]
    down = group.sums(lambda part: ones(part) if "down_proj" in part.name else None)
    assert down.tolist() == [64.0] * 128


def test_a_module_that_holds_a_network_has_the_networks_groups():
    foreign = ForeignLlama()
    assert list(by_name(foreign)) == list(by_name(foreign.net))
    assert shape_of(foreign) == shape_of(foreign.net)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_shape_is_what_the_configuration_says(name):
    model = family(name)
    shape = shape_of(model)
    assert shape["parameters"] == sum(p.numel() for p in model.parameters())
    assert (shape["layers"], shape["hidden"], shape["heads"]) == (3, 64, 8)
    assert shape["ffn"] == (256 if "gpt2" in name else 128)
    assert shape["kv_heads"] == getattr(model.config, "num_key_value_heads", 8)


def test_the_structure_of_a_model_without_storage_is_known():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(family("llama").config)
    assert [g.name for g in structure_of(model)] == [g.name for g in structure_of(family("llama"))]


def slm(pattern, **values):
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    return SLMForCausalLM(SLMConfig(**sizes, pattern=pattern, **values))


def gpt2(**values):
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=32, n_embd=32, n_head=4, n_layer=1, bos_token_id=0, eos_token_id=0, **values)
    )


def packed():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(128, 64, dtype=torch.int8), False)
    return model


class Two(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = tiny_llama(), tiny_slm()


REFUSED = {
    "another family": (Demo, "head", "A Demo holds no model .*families slm, llama"),
    "two networks": (Two, "head", "'student' and 'teacher'"),
    "no such unit": (tiny_llama, "neuron", "unit='neuron' must be one of 'head'"),
    "a mixer": (lambda: slm("attn/moe"), "ffn", "'model.layers.0.channel_mixer', a MoE"),
    "a mixer with heads": (lambda: slm("linear_attention/mlp"), "head", "'model.layers.0.token_mixer', a LinearAtt"),
    "no heads": (lambda: slm("mamba/mlp"), "head", "this 'slm' model has none"),
    "linked layers": (lambda: slm("rwkv7_first/rwkv7_ffn rwkv7/rwkv7_ffn"), "layer", "reads what another block"),
    "two streams": (lambda: slm("attn/mlp*2", reversible=True), "ffn", "reversible=True runs blocks in parts"),
    "meta tokens": (lambda: slm("attn/mlp", meta_tokens=2), "hidden", "'model.meta_tokens', a MetaTokens"),
    "cross-attention": (lambda: gpt2(add_cross_attention=True), "head", "crossattention', a GPT2Attention"),
    "counted layers": (lambda: gpt2(scale_attn_by_inverse_layer_idx=True), "layer", "how many are below"),
    "packed weights": (packed, "ffn", "'model.layers.1.mlp.up_proj' holds packed torch.int8; prune before"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused_by_name(case):
    make, unit, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        structure_of(make(), unit)


def test_adapters_are_named():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match=r"q_proj.*merge adapters first"):
        structure_of(model, "head")


def test_meta_tokens_and_foreign_mixers_are_no_hindrance_to_units_they_have_nothing_to_do_with():
    assert by_name(slm("attn/mlp", meta_tokens=2), ["head", "ffn"])
    assert by_name(slm("attn/moe rwkv4/moe"), ["head", "layer"])


@pytest.mark.slow
def test_a_sharded_model_has_a_structure_and_gates_but_is_not_shrunk(tmp_path):
    on_two_ranks(
        """
        import transformers
        from torch.distributed.fsdp import fully_shard
        from lightning_slm.pruning import gated, shrink_, structure_of
        torch.manual_seed(0)
        sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_attention_heads=4, num_hidden_layers=2)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))
        groups, ids = structure_of(model), torch.arange(6)[None]
        gates = {g.name: (torch.rand(g.size) > 0.4).float() for g in groups if g.unit != "layer"}
        with torch.no_grad(), gated(model, gates):
            whole = model(ids).logits
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert [(g.name, g.size) for g in structure_of(model)] == [(g.name, g.size) for g in groups]
        with torch.no_grad(), gated(model, gates):
            torch.testing.assert_close(model(ids).logits, whole, rtol=1e-5, atol=1e-6)
        try:
            shrink_(model, {"model.layers.0.mlp/ffn": [0], "model.layers.1.mlp/ffn": [0]})
        except ValueError as error:
            assert "sharded (a DTensor)" in str(error) and "before a strategy shards it" in str(error)
        else:
            raise AssertionError("not refused")
        """,
        tmp_path,
    )
