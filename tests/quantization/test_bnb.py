"""NF4 and LLM.int8() layers, against bitsandbytes' own, peft on those, and formulas written out by hand."""

import contextlib
import copy
import logging

import bitsandbytes
import peft
import pytest
import torch
from support import on_two_ranks, tiny_llama, tiny_slm
from torch import nn

from lightning_slm.errors import NoEffectWarning
from lightning_slm.measure import weight_bytes
from lightning_slm.quantization import prepare_qat_
from lightning_slm.quantization.bnb import bitsandbytes_state, dequantize_, frozen_layers, llm_int8_, nf4_
from lightning_slm.quantization.bnb_layers import LLMInt8Linear, NF4Linear

DTYPES = [torch.float32, torch.bfloat16]
# Appendix E of the paper of QLoRA.
NEGATIVE = torch.tensor([-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0])
POSITIVE = torch.tensor([0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0])
LEVELS = torch.cat([NEGATIVE, POSITIVE])


def net(inputs=128, outputs=96, bias=True, dtype=torch.float32):
    return nn.Sequential(nn.Linear(inputs, outputs, bias=bias, dtype=dtype))


def theirs(layer, make):
    """A layer of bitsandbytes' own with the weights of ``layer``, quantised by it."""
    made = make(layer.in_features, layer.out_features, bias=layer.bias is not None).to(layer.weight.dtype)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def their_nf4(layer, double_quant=True):
    return theirs(
        layer, lambda *sizes, bias: bitsandbytes.nn.LinearNF4(*sizes, bias=bias, compress_statistics=double_quant)
    )


def their_int8(layer, threshold=6.0):
    def make(*sizes, bias):
        return bitsandbytes.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, threshold=threshold)

    return theirs(layer, make).eval()  # in training mode it does not round the inputs on a CPU


@contextlib.contextmanager
def quiet():
    """Their int8 layer writes a line per call."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    logger.disabled = True
    yield
    logger.disabled = False


def assert_same(ours, other, x, towards=None):
    """Outputs, and gradients of inputs and bias, bit for bit."""
    xs = [x.detach().clone().requires_grad_() for _ in range(2)]
    with quiet():
        ys = [ours(xs[0]), other(xs[1])]
    towards = torch.randn_like(ys[0])
    ys[0].backward(towards)
    # Theirs sums a bias's gradient over the first axis only.
    ys[1].reshape(-1, ys[1].shape[-1]).backward(towards.reshape(-1, towards.shape[-1]))
    assert torch.equal(ys[0], ys[1])
    assert torch.equal(xs[0].grad, xs[1].grad)
    return xs[0].grad


# The numbers.


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 128), (2, 3, 128), (2, 1, 3, 128)], ids=str)
def test_nf4_computes_what_bitsandbytes_own_layer_does(shape, dtype, bias, double_quant):
    model = net(bias=bias, dtype=dtype)
    other = their_nf4(model[0], double_quant)
    assert nf4_(model, double_quant=double_quant) == ["0"]
    assert_same(model, other, torch.randn(shape, dtype=dtype))
    if bias and len(shape) == 2:  # their sum over several axes is rounded in between
        assert torch.equal(model[0].bias.grad, other.bias.grad)


@pytest.mark.parametrize("threshold", [0.0, 2.0, 6.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 128), (2, 3, 128)], ids=str)
def test_llm_int8_computes_what_bitsandbytes_own_layer_does(shape, dtype, bias, threshold):
    model = net(bias=bias, dtype=dtype)
    other = their_int8(model[0], threshold)
    assert llm_int8_(model, threshold) == ["0"]
    x = torch.randn(shape, dtype=dtype)
    x[..., 5] *= 20
    assert_same(model, other, x)
    if bias and len(shape) == 2:  # their sum over several axes is rounded in between
        assert torch.equal(model[0].bias.grad, other.bias.grad)


def test_one_block_of_nf4_is_the_formula_written_out_by_hand():
    model = net(64, 2, bias=False)
    weight = model[0].weight.detach().clone()
    nf4_(model, double_quant=False)
    for row, got in zip(weight, model[0].dequantized()):
        largest = row.abs().max()
        nearest = (row[:, None] / largest - LEVELS).abs().argmin(1)
        torch.testing.assert_close(got, LEVELS[nearest] * largest, atol=1e-6, rtol=0)


def test_double_quantisation_is_an_8_bit_code_of_what_the_magnitudes_differ_from_their_mean_by():
    model, single = net(256, 128, bias=False), net(256, 128, bias=False)
    single.load_state_dict(model.state_dict())
    nf4_(model)
    nf4_(single, double_quant=False)
    largest = single[0].statistics()["absmax"].view(-1, 256)  # 512 blocks of 64, in blocks of 256
    rest = largest - largest.mean()
    scale = rest.abs().amax(1, keepdim=True)
    codes = bitsandbytes.functional.create_dynamic_map()
    nearest = codes[(rest[..., None] / scale[..., None] - codes).abs().argmin(-1)]
    expected = (nearest * scale + largest.mean()).view(-1, 1)
    got = model[0].dequantized().view(-1, 64).abs().amax(1, keepdim=True)
    # One that lies halfway between two codes may fall either way.
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_llm_int8_is_the_formula_written_out_by_hand():
    model = net(bias=False)
    weight, x = model[0].weight.detach().clone(), torch.randn(5, 128)
    x[2, 7] = 9.0
    llm_int8_(model)
    outliers = (x.half().abs() >= 6).any(0)
    inside, row = torch.where(outliers, 0, x.half()), weight.half().abs().amax(1, keepdim=True).float()
    token = inside.abs().amax(1, keepdim=True).float()
    x_codes, codes = (inside.float() * 127 / token).round(), (weight.half().float() * 127 / row).round()
    expected = (x_codes @ codes.T) * (token / 127) * (row / 127).T + x[:, outliers] @ (codes * row / 127)[:, outliers].T
    # 1 / 127^2 is a constant of six digits there, and float16 may round a code the other way.
    torch.testing.assert_close(model(x), expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("freeze", [nf4_, llm_int8_])
def test_gradients_are_those_of_the_weights_that_the_codes_stand_for(freeze):
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    freeze(model, skip="0")
    x = torch.randn(4, 64, requires_grad=True)
    hidden = model[1](model[0](x))
    towards = torch.randn(4, 64)
    (model[2](hidden) * towards).sum().backward()
    plain = model[2].dequantized()
    torch.testing.assert_close(model[2].bias.grad, towards.sum(0))
    by_hand = ((towards @ plain) * (1 - hidden**2)) @ model[0].weight
    torch.testing.assert_close(x.grad, by_hand, atol=1e-5, rtol=1e-5)
    assert model[2].weight.grad is None


@pytest.mark.parametrize("freeze", [nf4_, llm_int8_])
def test_under_autocast_a_layer_answers_in_bfloat16_and_its_bias_stays_in_float32(freeze):
    model, x = net(), torch.randn(3, 128)
    freeze(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    y.float().sum().backward()
    twin = copy.deepcopy(model).to(torch.bfloat16)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, twin(x.bfloat16()))
    assert model[0].bias.dtype == model[0].bias.grad.dtype == torch.float32


def test_compute_dtype_casts_for_the_product_only():
    model, x = net(bias=False), torch.randn(3, 128)
    other = copy.deepcopy(model)
    nf4_(model, compute_dtype=torch.bfloat16)
    nf4_(other)
    assert torch.equal(model(x), other(x.bfloat16()).float())


@pytest.mark.parametrize("freeze", [nf4_, llm_int8_])
def test_no_tokens_and_a_single_one_without_a_batch_give_what_they_give_elsewhere(freeze):
    model = net()
    freeze(model)
    x = torch.randn(4, 128)
    assert model(x[:0]).shape == (0, 96)
    torch.testing.assert_close(model(x[0]), model(x)[0], atol=1e-5, rtol=0)
    assert model(torch.zeros(2, 128)).isfinite().all()


# What changes in a model, and what does not.


@pytest.mark.parametrize(("freeze", "kind"), [(nf4_, NF4Linear), (llm_int8_, LLMInt8Linear)])
@pytest.mark.parametrize("make", [tiny_slm, tiny_llama])
def test_a_model_keeps_its_parameters_names_and_hooks_and_freezes_only_its_hidden_layers(freeze, kind, make):
    model, seen = make(), []
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    names = freeze(model)
    model.get_submodule(names[0]).register_forward_hook(lambda *_: seen.append(1))
    freeze(model)
    after = dict(model.named_parameters())
    assert list(model.state_dict()) == keys
    assert all(after[name] is p for name, p in before.items())
    assert {name for name, p in after.items() if not p.requires_grad} == {f"{name}.weight" for name in names}
    assert len(names) == {tiny_slm: 8, tiny_llama: 14}[make]
    assert all(type(model.get_submodule(name)) is kind for name in names)
    assert type(model.get_output_embeddings()) is nn.Linear
    model(torch.arange(8)[None])
    assert seen == [1]


@pytest.mark.parametrize("freeze", [nf4_, llm_int8_])
def test_a_copy_and_a_cast_leave_the_codes_and_what_they_are_multiplied_by_alone(freeze):
    model, x = net(), torch.randn(3, 128)
    freeze(model)
    before = copy.deepcopy(model)
    model.to(torch.bfloat16)
    assert model[0].bias.dtype == torch.bfloat16
    assert torch.equal(model[0].weight, before[0].weight)
    assert torch.equal(model[0].dequantized(torch.float32), before[0].dequantized(torch.float32))
    assert before[0].weight is not model[0].weight
    assert before(x).dtype == torch.float32


@pytest.mark.parametrize("freeze", [nf4_, llm_int8_])
def test_it_trains_after_an_evaluation(freeze):
    """Their 4-bit layer repacks its weights there on a CPU with AVX512-BF16, and has no gradient after."""
    model, x = net(), torch.randn(3, 128, requires_grad=True)
    freeze(model)
    y = model(x)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), y)
    assert torch.equal(model.train()(x), y)
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore")  # the compiler hides warnings of its own, but not once they are errors
@pytest.mark.parametrize("freeze", [nf4_, llm_int8_])
def test_the_compiler_changes_no_bit(freeze):
    model, grads, ys = nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 128)), [], []
    freeze(model)
    x = torch.randn(2, 3, 128)
    for f in (model, torch.compile(model, backend="aot_eager", fullgraph=freeze is nf4_)):
        x_ = x.clone().requires_grad_()
        ys.append(f(x_))
        ys[-1].square().sum().backward()
        grads.append(x_.grad)
    assert torch.equal(*ys)
    assert torch.equal(*grads)


def test_a_weight_takes_four_bits_and_an_eighth():
    model = net(1024, 256, bias=False)
    nf4_(model)
    blocks = 1024 * 256 / 64
    assert weight_bytes(model) == 1024 * 256 / 2 + blocks + blocks / 256 * 4 + 256 * 4 + 4  # codes of codes, one offset
    single = net(1024, 256, bias=False)
    nf4_(single, double_quant=False)
    assert weight_bytes(single) == 1024 * 256 * 4.5 / 8
    int8 = net(1024, 256, bias=False)
    llm_int8_(int8)
    assert weight_bytes(int8) == 1024 * 256 + 256 * 4


# State dicts.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("freeze", "settings"), [(nf4_, {"double_quant": False}), (llm_int8_, {})])
def test_a_state_dict_loads_into_a_plain_model_and_is_frozen_again_to_the_same_bits(freeze, settings, dtype):
    for exponent in range(-2, 3):  # float16, in which rows are rounded to int8, ends at 6e-5
        model = net(dtype=dtype)
        model[0].weight.data.mul_(10.0**exponent)[:3] = 0
        freeze(model, **settings)
        plain, into_frozen = net(dtype=dtype), net(dtype=dtype)
        plain.load_state_dict(model.state_dict())
        assert torch.equal(plain[0].weight, model[0].dequantized())
        freeze(into_frozen, **settings)
        into_frozen.load_state_dict(model.state_dict())
        freeze(plain, **settings)
        for again in (plain, into_frozen):
            assert torch.equal(again[0].weight, model[0].weight)
            assert torch.equal(again[0].bias, model[0].bias)
            assert torch.equal(again[0].dequantized(), model[0].dequantized())


def test_after_double_quantisation_the_codes_come_back_and_the_magnitudes_nearly_or_by_their_statistics():
    model, again = net(512, 256), net(512, 256)
    nf4_(model)
    again.load_state_dict(model.state_dict())
    nf4_(again)
    assert torch.equal(again[0].weight, model[0].weight)
    error = (again[0].dequantized() - model[0].dequantized()).abs().max()
    assert 0 < error < 2e-3 * model[0].dequantized().abs().max()
    again[0].set_statistics_(model[0].statistics())
    assert torch.equal(again[0].dequantized(), model[0].dequantized())


@pytest.mark.parametrize("freeze", [nf4_, llm_int8_])
def test_a_state_dict_that_does_not_fit_is_refused_by_name(freeze):
    model = net()
    freeze(model)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0.weight: \(96, 64\) in the checkpoint, \(96, 128\)"):
        model.load_state_dict(net(64).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0.weight\", \"0.bias\""):
        model.load_state_dict({})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"0.other\""):
        model.load_state_dict({**net().state_dict(), "0.other": torch.ones(1)})
    assert model.load_state_dict({}, strict=False).missing_keys == ["0.weight", "0.bias"]


def test_a_model_without_frozen_layers_has_no_such_folder():
    with pytest.raises(ValueError, match="one kind of frozen layers, and the model has 0"):
        bitsandbytes_state(net())


# Adapters.


OLD_NAME = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft 0.21.2 asks for it


def lora(model, **kwargs):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **kwargs)
    torch.manual_seed(0)
    return peft.get_peft_model(model, config)


def randomise_(model):
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.manual_seed(1)
            nn.init.normal_(p, std=0.02)


def losses_and_gradients(model):
    ids = torch.arange(24).view(2, 12)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@OLD_NAME
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_of_peft_trains_as_on_bitsandbytes_own_layers(when):
    ours, other = tiny_llama(tied=False), tiny_llama(tied=False)
    other.load_state_dict(ours.state_dict())
    names = [n for n, m in other.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    for name in names:
        other.set_submodule(name, their_nf4(other.get_submodule(name)))
    other.is_loaded_in_4bit = True
    other = lora(other).train()
    ours = lora(ours) if when == "after" else ours
    assert len(nf4_(ours)) == 14, "the adapters are not frozen"
    ours = (lora(ours) if when == "before" else ours).train()
    randomise_(ours)
    randomise_(other)
    (a, ours_grads), (b, their_grads) = losses_and_gradients(ours), losses_and_gradients(other)
    assert torch.equal(a, b)
    assert {"lora_A", "lora_B"} == {name.split(".")[-3] for name in ours_grads}
    assert ours_grads.keys() == their_grads.keys()
    assert all(torch.equal(grad, their_grads[name]) for name, grad in ours_grads.items())


@OLD_NAME
def test_adapters_are_merged_into_the_weights_that_the_codes_stand_for():
    model = lora(tiny_llama(tied=False)).eval()
    randomise_(model)
    nf4_(model)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model(ids).logits
        dequantize_(model)
        assert frozen_layers(model) == {}
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, before, atol=1e-5, rtol=0)
    assert not merged.model.layers[0].mlp.up_proj.weight.requires_grad


# Refusals.


def test_rows_that_are_not_whole_blocks_are_left_in_full_precision_and_named():
    """The kernel of bitsandbytes 0.50.2 for AVX-512 reads the magnitude of another block there."""
    model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 96))
    with pytest.warns(NoEffectWarning, match=r"0.weight has rows of 96, which are not whole blocks of 64"):
        assert nf4_(model) == ["1"]
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


def test_a_weight_shared_by_two_layers_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    with pytest.warns(NoEffectWarning, match=r"0.weight is shared with another module"):
        assert nf4_(model) == ["2"]


def test_wrong_settings_and_weights_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"block=48 must be one of 32, 64"):
        nf4_(net(), block=48)
    with pytest.raises(ValueError, match=r"threshold=-1 must not be negative"):
        llm_int8_(net(), threshold=-1)
    with torch.device("meta"), pytest.raises(ValueError, match="meta device"):
        nf4_(net())


def test_a_layer_has_one_owner():
    model = tiny_slm()
    prepare_qat_(model, targets="*o_proj")
    with pytest.raises(ValueError, match=r"o_proj' computes as FakeQuantLinear already, so it cannot become NF4Linear"):
        nf4_(model)
    assert frozen_layers(model) == {}
    nf4_(model, skip="*o_proj")
    with pytest.raises(ValueError, match=r"computes as NF4Linear already"):
        llm_int8_(model, targets="*qkv_proj")
    with pytest.raises(ValueError, match=r"computes with NF4\(double_quant=True"):
        nf4_(model, block=32, targets="*qkv_proj")
    with pytest.raises(ValueError, match=r"computes as NF4Linear already, so it cannot become FakeQuantLinear"):
        prepare_qat_(model, targets="*qkv_proj")


# Sharded.


def test_sharded_over_two_ranks_it_computes_the_same_and_its_state_dict_is_whole_again(tmp_path):
    """fully_shard on gloo; rows that do not divide among the ranks included."""
    on_two_ranks(
        """
        import torch, warnings
        from torch import nn
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor
        from lightning_slm.nn.sharded import sharded_like, whole
        from lightning_slm.quantization.bnb import llm_int8_, nf4_

        for freeze in (nf4_, llm_int8_):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(128, 65), nn.LayerNorm(65), nn.Linear(65, 64), nn.Linear(64, 33))
            freeze(model, skip="2")
            plain = {k: v.clone() for k, v in model.state_dict().items()}
            x = torch.randn(4, 128, requires_grad=True)
            y = model(x)
            y.square().sum().backward()
            grad, bias_grad, x.grad = x.grad, model[0].bias.grad.clone(), None
            model.zero_grad()
            for layer in model:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert isinstance(model[0].weight, DTensor) and model[0].weight.dtype in (torch.uint8, torch.int8)
            again = model(x)
            assert torch.equal(y, again)
            again.square().sum().backward()
            assert torch.equal(x.grad, grad)
            torch.testing.assert_close(whole(model[0].bias.grad), bias_grad)
            state = model.state_dict()
            assert all(torch.equal(whole(state[k]), v) for k, v in plain.items())
            cut = {k: sharded_like(2 * v, state[k]) for k, v in plain.items()}
            model.load_state_dict(cut)
            error = whole(model.state_dict()["0.weight"]) - 2 * plain["0.weight"]
            assert error.abs().max() < 1e-3
        """,
        tmp_path,
    )
