"""FP8 layers against torchao's own conversion, and against the formulas written out by hand."""

import copy
import dataclasses

import pytest
import torch
from support import tiny_llama, tiny_slm
from torch import nn
from torch.distributed.fsdp import fully_shard
from torchao.float8 import Float8LinearConfig, convert_to_float8_training, float8_ops

from lightning_slm.errors import NoEffectWarning
from lightning_slm.quantization import float8, prepare_qat_
from lightning_slm.quantization.float8 import (
    RECIPES,
    Float8Linear,
    check_hardware,
    float8_,
    float8_all_gather_,
    gathers_float8,
)

# Shape letters: B, T, U = leading axes, N = tokens, I = inputs, O = outputs.

every_recipe = pytest.mark.parametrize("recipe", RECIPES)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def layer(inputs=32, outputs=48, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype)


def ours(module, recipe="tensorwise", **kwargs):
    """A copy, exchanged; the layer may be the whole model."""
    holder = nn.ModuleList([copy.deepcopy(module)])
    float8_(holder, recipe, emulate=True, **kwargs)
    return holder[0]


def torchaos(module, recipe):
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    return convert_to_float8_training(copy.deepcopy(module), config=config)


def passes(module, x, seed=1):
    """Output, and the gradients of the input and of every parameter, for a random gradient of the output."""
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def rounded(tensor, kind, dim=None, power_of_two=False):
    """By hand: to FP8 and back, with one scale or one per row along ``dim``."""
    largest = tensor.abs().max() if dim is None else tensor.abs().amax(dim, keepdim=True)
    scale = (torch.finfo(kind).max / largest.double().clamp(min=1e-12)).float()
    if power_of_two:
        scale = 2.0 ** scale.log2().floor()
    return (tensor * scale).to(kind).float() / scale


@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 8, 32), (2, 3, 4, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_recipe
def test_outputs_and_gradients_are_torchaos_bit_for_bit(recipe, dtype, shape):
    for bias in (True, False):
        plain, x = layer(bias=bias, dtype=dtype), torch.randn(shape, dtype=dtype)
        if len(shape) == 1 and recipe != "tensorwise":
            x = x[None]  # torchao's rows need two axes
        for mine, theirs in zip(passes(ours(plain, recipe), x), passes(torchaos(plain, recipe), x), strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)


@every_recipe
def test_a_whole_model_computes_as_torchaos_conversion_of_it(recipe):
    ids = torch.randint(96, (2, 8))
    model, theirs = tiny_llama(), tiny_llama()
    theirs.load_state_dict(model.state_dict())
    names = float8_(model, recipe, emulate=True)
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    convert_to_float8_training(theirs, config=config, module_filter_fn=lambda module, name: name in names)
    losses = [m(input_ids=ids, labels=ids).loss for m in (model, theirs)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, mine), other in zip(model.named_parameters(), theirs.parameters()):
        assert torch.equal(mine.grad, other.grad), name


def test_tensorwise_is_e4m3_forward_and_e5m2_backward_by_hand():
    plain, x_NI = layer(bias=False), torch.randn(24, 32)
    y_NO, grad_x_NI, grad_OI = passes(ours(plain), x_NI)
    g_NO = torch.randn(24, 48, generator=torch.Generator().manual_seed(1))
    weight_OI = plain.weight.detach()
    tolerance = {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(y_NO, rounded(x_NI, E4M3) @ rounded(weight_OI, E4M3).T, **tolerance)
    torch.testing.assert_close(grad_x_NI, rounded(g_NO, E5M2) @ rounded(weight_OI, E4M3), **tolerance)
    torch.testing.assert_close(grad_OI, rounded(g_NO, E5M2).T @ rounded(x_NI, E4M3), **tolerance)


def test_rowwise_is_e4m3_everywhere_with_scales_that_are_powers_of_two_by_hand():
    plain, x_NI = layer(bias=False), torch.randn(24, 32)
    y_NO, grad_x_NI, grad_OI = passes(ours(plain, "rowwise"), x_NI)
    g_NO = torch.randn(24, 48, generator=torch.Generator().manual_seed(1))

    def along(tensor, dim):
        return rounded(tensor, E4M3, dim, power_of_two=True)

    weight_OI = plain.weight.detach()
    tolerance = {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(y_NO, along(x_NI, 1) @ along(weight_OI, 1).T, **tolerance)
    torch.testing.assert_close(grad_x_NI, along(g_NO, 1) @ along(weight_OI, 0), **tolerance)
    torch.testing.assert_close(grad_OI, along(g_NO, 0).T @ along(x_NI, 0), atol=4e-6, rtol=1e-6)


def test_rowwise_with_gw_hp_computes_the_weights_gradient_in_high_precision():
    plain, x_NI = layer(bias=False), torch.randn(24, 32)
    _, grad_x_NI, grad_OI = passes(ours(plain, "rowwise_with_gw_hp"), x_NI)
    g_NO = torch.randn(24, 48, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(grad_OI, g_NO.T @ x_NI, atol=1e-6, rtol=1e-6)
    g_rows_NO = rounded(g_NO, E4M3, 1, power_of_two=True)
    weight_OI = rounded(plain.weight.detach(), E4M3, power_of_two=True)
    torch.testing.assert_close(grad_x_NI, g_rows_NO @ weight_OI, atol=1e-6, rtol=1e-6)


@every_recipe
def test_under_cpu_autocast_it_is_torchaos_layer_on_inputs_of_autocasts_dtype(recipe):
    plain, x = layer(), torch.randn(2, 8, 32)
    with torch.autocast("cpu", torch.bfloat16):
        mine = passes(ours(plain, recipe), x)
    theirs = passes(torchaos(plain, recipe), x.bfloat16())
    assert mine[0].dtype == torch.bfloat16
    assert mine[2].dtype == mine[3].dtype == torch.float32  # the weights stay what they are
    for a, b in zip(mine, theirs):
        assert torch.equal(a, b.to(a.dtype))


@pytest.mark.parametrize("tokens", [16, 5])
def test_the_hardwares_products_agree_with_the_emulated_ones(monkeypatch, tokens):
    """PyTorch multiplies FP8 on a CPU too, slowly: the same path as on a GPU, padding of odd batches included."""
    padded = []
    monkeypatch.setattr(float8, "check_hardware", lambda *_: None)
    pad = float8_ops.pad_tensor_for_matmul
    monkeypatch.setattr(float8_ops, "pad_tensor_for_matmul", lambda t, dims: padded.append(pad(t, dims)) or padded[-1])
    plain, x = layer(dtype=torch.bfloat16), torch.randn(tokens, 32, dtype=torch.bfloat16)
    real = nn.ModuleList([copy.deepcopy(plain)])
    float8_(real)
    for a, b in zip(passes(real[0], x), passes(ours(plain), x)):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=1e-2)  # one rounding to bfloat16
    assert [tuple(t.shape) for t in padded] == (
        [] if tokens == 16 else [(48, 16), (16, 32)]
    )  # of the weight's gradient


def test_parameters_keys_and_modes_stay_and_twice_is_once():
    model = tiny_slm()
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    names = float8_(model, emulate=True)
    assert names == float8_(model, emulate=True)
    assert all(before[name] is p for name, p in model.named_parameters())
    assert list(model.state_dict()) == keys
    exchanged = {name for name, m in model.named_modules() if isinstance(m, Float8Linear)}
    assert exchanged == set(names)
    assert type(model.get_output_embeddings()) is nn.Linear
    assert len(names) == 2 * 4  # qkv, o, gate_up, down of two blocks
    other = tiny_slm()
    other.load_state_dict(model.state_dict())
    float8_(other, emulate=True)
    ids = torch.randint(96, (2, 8))
    assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_copy_computes_the_same_and_is_apart():
    module = ours(layer())
    twin, x = copy.deepcopy(module), torch.randn(4, 32)
    assert torch.equal(twin(x), module(x))
    with torch.no_grad():
        twin.weight.zero_()
    assert not torch.equal(twin(x), module(x))


def test_a_frozen_weight_gets_no_gradient_and_passes_it_on():
    plain = layer().requires_grad_(False)
    x = torch.randn(4, 32, requires_grad=True)
    module = ours(plain)
    module(x).sum().backward()
    assert module.weight.grad is None
    assert x.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*should not be instantiated. Methods on autograd functions")
@every_recipe
def test_compiled_it_computes_the_same(recipe):
    module, x = ours(layer(), recipe), torch.randn(2, 8, 32)
    eager = passes(module, x)
    module.zero_grad()
    module.compile(backend="aot_eager")
    for a, b in zip(passes(module, x), eager):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_a_layer_whose_sides_are_no_multiples_of_16_stays_and_is_named():
    model = nn.ModuleDict({"fits": layer(), "odd": layer(30, 48)})
    with pytest.warns(NoEffectWarning, match=r"odd.weight of \(48, 30\) is not a multiple of 16 on both sides") as seen:
        assert float8_(model, emulate=True) == ["fits"]
    assert len(seen) == 1
    assert type(model["odd"]) is nn.Linear


def test_what_is_asked_for_and_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"'row_wise' is unknown. Near names: 'rowwise'"):
        float8_(tiny_slm(), "row_wise", emulate=True)
    with pytest.raises(ValueError, match="matches no weight"):
        float8_(tiny_slm(), emulate=True, targets="*nothing*")
    model = tiny_slm()
    float8_(model, emulate=True)
    with pytest.raises(ValueError, match="each layer is rounded in one way"):
        float8_(model, "rowwise", emulate=True)
    with pytest.raises(ValueError, match="computes as Float8Linear already"):
        prepare_qat_(model, embedding=None)
    model = tiny_slm()
    prepare_qat_(model, embedding=None)
    with pytest.raises(ValueError, match="computes as FakeQuantLinear already"):
        float8_(model, emulate=True)


def test_without_the_hardware_the_way_out_is_named():
    with pytest.raises(RuntimeError, match=r"capability 8.9 .* no GPU that PyTorch can use. emulate=True computes"):
        float8_(tiny_slm())


@pytest.mark.parametrize("recipe", RECIPES)
def test_in_inference_mode_it_computes_what_it_computes_without_gradients(recipe):
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    float8_(model, recipe, emulate=True)
    x = torch.randn(16, 32)
    with torch.no_grad():
        expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x.clone()), expected)


@pytest.mark.parametrize(
    ("recipe", "capability", "fits"),
    [
        ("tensorwise", (8, 6), False),
        ("tensorwise", (8, 9), True),
        ("rowwise", (8, 9), False),
        ("rowwise", (9, 0), True),
    ],
)
def test_the_hardware_is_asked_for_its_capability(monkeypatch, recipe, capability, fits):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "The Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    if fits:
        return check_hardware(recipe, "cuda:0")
    with pytest.raises(RuntimeError, match=f"recipe='{recipe}' needs .* and The Card does not"):
        check_hardware(recipe, "cuda:0")


def test_twenty_steps_in_fp8_lose_no_more_than_in_bf16():
    ids = torch.randint(96, (4, 33), generator=torch.Generator().manual_seed(0))
    losses = {}
    for recipe in (None, *RECIPES):
        torch.manual_seed(0)
        model = tiny_slm().train()
        if recipe is not None:
            float8_(model, recipe, emulate=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses[recipe] = []
        for _ in range(20):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[recipe].append(loss.item())
    bf16 = losses.pop(None)
    assert bf16[-1] < 0.7 * bf16[0]
    for recipe, fp8 in losses.items():
        assert fp8 == pytest.approx(bf16, rel=0.05), recipe


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_gathered_as_fp8_it_computes_the_same_and_its_state_dict_is_plain(one_process):
    model = tiny_slm()
    float8_(model, emulate=True)
    twin = copy.deepcopy(model)
    model.model.layers[0].channel_mixer.down_proj.weight.mark = "kept"
    names = float8_all_gather_(model)
    assert names == float8_all_gather_(model)
    assert set(names) == {name for name, m in model.named_modules() if gathers_float8(m)}
    assert model.model.layers[0].channel_mixer.down_proj.weight.mark == "kept"
    assert {type(v) for v in model.state_dict().values()} == {torch.Tensor}
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=one_process)
    ids = torch.randint(96, (2, 8))
    for m in (model, twin):
        m(input_ids=ids, labels=ids).loss.backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert torch.equal(p.grad.full_tensor(), q.grad), name
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, twin(input_ids=ids).logits)
    assert {type(v._local_tensor) for v in model.state_dict().values()} == {torch.Tensor}
    model.load_state_dict({key: torch.zeros_like(value) for key, value in model.state_dict().items()})
    assert all(not p.full_tensor().any() for p in model.parameters())


def test_what_has_no_single_scale_of_its_own_is_not_gathered_as_fp8():
    model = tiny_slm()
    float8_(model, "rowwise", emulate=True)
    with pytest.raises(ValueError, match="gathered in FP8 with one scale"):
        float8_all_gather_(model)
    tied = nn.ModuleDict({"a": layer(32, 32), "b": layer(32, 32)})
    tied["b"].weight = tied["a"].weight
    float8_(tied, emulate=True)
    assert float8_all_gather_(tied) == []
    assert tied["a"].weight is tied["b"].weight
