"""Preparing, training and converting models: what changes, what must not, and that fake equals real."""

import copy

import pytest
import torch
from support import Demo, ForeignLlama
from support import tiny_llama as llama
from support import tiny_slm as ours
from torch import nn
from torch.nn import functional as F

from lightning_slm.errors import NoEffectWarning
from lightning_slm.nn.targets import weight_targets
from lightning_slm.pruning import magnitude_
from lightning_slm.quantization import (
    SCHEMES,
    convert_qat_,
    enable_fake_quant_,
    fake_quant_layers,
    fake_quantize_activation,
    fake_quantize_weight,
    prepare_qat_,
    quantize_layer,
    unprepare_qat_,
)


def perceptron():
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))


def tokens():
    return torch.randint(96, (2, 12))


def test_preparing_changes_classes_and_nothing_else():
    model = ours().train()
    model.model.layers[0].eval()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    keys, modes = list(model.state_dict()), [m.training for m in model.modules()]
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    names = prepare_qat_(model)
    assert {"lm_head", "model.embed_tokens"} < set(names)
    assert len(names) == len(weight_targets(model)) + 2
    assert list(model.state_dict()) == keys
    assert [m.training for m in model.modules()] == modes
    for name, p in model.named_parameters():
        assert id(p) == before[name][0]
        assert torch.equal(p, before[name][1])
    model(tokens())
    assert calls == [1]


def test_doing_it_twice_is_doing_it_once_and_otherwise_is_refused():
    model = ours()
    names = prepare_qat_(model)
    ids = tokens()
    first = model(ids).logits
    assert prepare_qat_(model) == names
    assert torch.equal(model(ids).logits, first)
    with pytest.raises(ValueError, match=r"is prepared as .*bits=4.* asked for as .*bits=2"):
        prepare_qat_(model, "int2_weight")
    unprepare_qat_(model)
    prepare_qat_(model, "int2_weight")
    assert not torch.equal(model(ids).logits, first)


def test_a_linear_layer_computes_with_rounded_weights_and_inputs():
    model, x = perceptron(), torch.randn(5, 64)
    expected = x
    for layer in model:
        if isinstance(layer, nn.Linear):
            rounded = fake_quantize_activation(expected), fake_quantize_weight(layer.weight, 4, 32)
            expected = F.linear(*rounded, layer.bias)
        else:
            expected = layer(expected)
    prepare_qat_(model, "int8_act_int4_weight")
    assert torch.equal(model(x), expected)


def test_switched_off_or_undone_it_computes_as_if_never_prepared():
    model, ids = ours(), tokens()
    plain = model(ids).logits
    prepare_qat_(model)
    assert not torch.equal(model(ids).logits, plain)
    enable_fake_quant_(model, False)
    assert torch.equal(model(ids).logits, plain)
    enable_fake_quant_(model, True)
    unprepare_qat_(model)
    assert torch.equal(model(ids).logits, plain)
    assert fake_quant_layers(model) == []
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("make", [ours, llama, lambda: ours(tied=False)], ids=["ours", "llama", "untied"])
def test_fake_equals_real_exactly_after_training_and_converting(make, scheme):
    model, ids = make(), tokens()
    prepare_qat_(model, scheme, embedding="int4")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        fake = model(ids).logits
        convert_qat_(model)
        real = model(ids).logits
    assert (fake - real).abs().max() == 0.0
    assert type(model.lm_head.weight).__name__ == "IntxUnpackedToInt8Tensor"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fake_equals_real_with_bfloat16_weights_and_under_autocast(scheme):
    for model, autocast in ((ours().to(torch.bfloat16), False), (ours(), True)):
        ids = tokens()
        prepare_qat_(model, scheme)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            fake = model(ids).logits
            convert_qat_(model)
            real = model(ids).logits
        assert (fake - real).abs().max() == 0.0


def test_two_of_four_survives_rounding_and_converting():
    model = ours()
    magnitude_(model, sparsity=0.5, group=4)
    prepare_qat_(model, "int8_act_int4_weight")
    layers = dict(fake_quant_layers(model))
    for target in weight_targets(model):
        codes, _ = quantize_layer(layers[target.module_name])
        assert (codes[target.weight == 0] == 0).all()
        assert ((codes.reshape(-1, 4) == 0).sum(1) >= 2).all()
    masks = {t.module_name: t.weight == 0 for t in weight_targets(model)}
    convert_qat_(model)
    for name, mask in masks.items():
        assert (model.get_submodule(name).weight.dequantize()[mask] == 0).all()


@pytest.mark.parametrize("make", [ours, llama])
def test_a_tied_embedding_stays_one_parameter_rounded_alike_in_both_places(make):
    model, ids = make(), tokens()
    prepare_qat_(model, "int4_weight", embedding="int4")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rounded = fake_quantize_weight(model.lm_head.weight, 4, 32)
    assert torch.equal(model.model.embed_tokens(ids), rounded[ids])
    hidden = torch.randn(3, 64)
    assert torch.equal(model.lm_head(hidden), hidden @ rounded.T)
    convert_qat_(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_rows_that_are_looked_up_get_the_gradient_of_the_whole_table():
    ids = torch.randint(50, (3, 4))
    grads = []
    for seen in (ids, ids.repeat(8, 1)):  # fewer ids than rows: rounds the rows; more: rounds the table
        torch.manual_seed(0)
        table = nn.Embedding(50, 32)
        prepare_qat_(nn.ModuleList([table, nn.Linear(32, 1)]), embedding="int8")
        table(seen).square().sum().backward()
        grads.append(table.weight.grad)
    torch.testing.assert_close(grads[0] * 8, grads[1], rtol=1e-6, atol=1e-6)


def test_embeddings_and_head_go_by_their_own_argument_and_by_skip():
    def bits(**kwargs):
        model = ours(tied=False)
        prepare_qat_(model, "int2_weight", **kwargs)
        return {name: layer.quant.bits for name, layer in fake_quant_layers(model) if "layers" not in name}

    assert bits() == {"model.embed_tokens": 8, "lm_head": 8}
    assert bits(embedding="int4") == {"model.embed_tokens": 4, "lm_head": 4}
    assert bits(embedding=None) == {}
    assert bits(skip="lm_head") == {"model.embed_tokens": 8}
    tied = ours()
    prepare_qat_(tied, skip="lm_head")  # one parameter: left out by either name
    assert type(tied.model.embed_tokens) is nn.Embedding


def test_layers_are_chosen_by_name_and_a_wrong_name_says_what_is_near():
    model = ours()
    names = prepare_qat_(model, targets="*_proj", skip="*down_proj", embedding=None)
    assert names
    assert all(name.endswith("_proj") and not name.endswith("down_proj") for name in names)
    with pytest.raises(ValueError, match="matches no weight"):
        prepare_qat_(ours(), targets="*q_prj")
    with pytest.raises(ValueError, match=r"scheme='int4_wait' is unknown. Near names: 'int4_weight'"):
        prepare_qat_(ours(), "int4_wait")


def test_a_group_that_does_not_divide_a_row_names_the_layer_and_the_way_out():
    model = nn.ModuleDict({"a": nn.Linear(64, 8), "b": nn.Linear(40, 8)})
    with pytest.raises(ValueError, match=r"'b': group=32 does not divide its rows of 40; choose group=40, or skip='b'"):
        prepare_qat_(model)
    assert type(model["a"]) is nn.Linear, "nothing is changed where something is refused"
    assert prepare_qat_(model, skip="b") == ["a"]
    with pytest.raises(ValueError, match="embedding=None"):
        prepare_qat_(nn.ModuleDict({"a": nn.Linear(64, 8), "e": nn.Embedding(5, 20)}))


def test_attention_of_pytorch_keeps_its_weights_and_says_so():
    model = Demo().eval()
    with pytest.warns(NoEffectWarning, match=r"MultiheadAttention: .*in_proj_weight.*out_proj"):
        names = prepare_qat_(model, group=16)
    assert not any("attn" in name for name in names)
    assert {"model.decoder", "model.embedding"} < set(names)
    unprepare_qat_(model)
    prepare_qat_(model, group=16, skip="*attn*")  # asked for so: nothing to say
    ids = torch.randint(64, (2, 8))
    fake = model(ids, ids)
    convert_qat_(model)
    assert torch.equal(model(ids, ids), fake)


def test_nothing_to_quantise_is_said():
    with pytest.warns(NoEffectWarning, match="found no layer"):
        prepare_qat_(ours(), skip="*", embedding=None)
    with pytest.raises(ValueError, match="no fake-quantised layers to convert"):
        convert_qat_(perceptron())


@pytest.mark.filterwarnings("ignore::lightning_slm.errors.NoEffectWarning")
@pytest.mark.parametrize("padded", [False, True])
def test_pytorchs_fused_encoder_layer_does_not_bypass_the_rounding(padded):
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 32)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    plain = encoder(x, src_key_padding_mask=mask)
    prepare_qat_(encoder, "int2_weight", group=16)
    slow = encoder(x, src_key_padding_mask=mask)  # with gradients on, the fused path is never taken
    with torch.no_grad():
        fast = encoder(x, src_key_padding_mask=mask)
    kept = slice(None) if mask is None else ~mask
    torch.testing.assert_close(fast[kept], slow[kept], rtol=0, atol=1e-5)  # the attention itself may stay fused
    assert not torch.allclose(plain[kept], fast[kept], atol=1e-2)


@pytest.mark.filterwarnings("ignore")  # the compiler hides warnings of its own, but not once they are errors
def test_a_compiled_model_rounds_the_same_and_feels_the_switch():
    model, x = perceptron(), torch.randn(5, 64)
    plain = model(x)
    prepare_qat_(model, "int8_act_int4_weight")
    eager = model(x)
    eager.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.compile(fullgraph=True)
    compiled = model(x)
    compiled.sum().backward()
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)
    for p, grad in zip(model.parameters(), grads):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=1e-4)
    enable_fake_quant_(model, False)
    torch.testing.assert_close(model(x), plain, rtol=0, atol=1e-5)


def test_a_prepared_model_copies_and_its_checkpoint_loads_into_a_plain_one():
    model, ids = ours(), tokens()
    prepare_qat_(model)
    again = copy.deepcopy(model)
    assert torch.equal(again(ids).logits, model(ids).logits)
    plain = ours()
    plain.load_state_dict(model.state_dict())
    enable_fake_quant_(model, False)
    assert torch.equal(plain(ids).logits, model(ids).logits)


def test_a_foreign_module_around_a_model_is_prepared_like_the_model():
    module = ForeignLlama()
    names = prepare_qat_(module)
    assert "net.lm_head" in names
    assert module.net.lm_head.weight is module.net.model.embed_tokens.weight
