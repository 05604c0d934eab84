"""Structured pruning as a whole: what stays for a target, and that the best units stay.

Shape letters: B = batch, T = tokens.
"""

import copy

import pytest
import torch
import transformers
from pruning_families import HF, LAYERS
from safetensors.torch import load_file, save_file
from support import tiny_llama, tiny_slm

from lightning_slm.measure import flops_per_token
from lightning_slm.models import SLMConfig, SLMForCausalLM
from lightning_slm.pruning import Target, plan, replay_, scores_of, shape_of, shrink_, structure_of, structured_
from lightning_slm.pruning.structured import on_the_way, target_shape


def llama():
    """Eight query heads, four key-value heads of width 8, 64 channels, 128 units, 3 layers; in evaluation mode."""
    torch.manual_seed(0)
    return HF["llama"]().eval()


@pytest.fixture
def data():
    torch.manual_seed(1)
    return [torch.randint(2, 96, (2, 7)) for _ in range(2)]


def changed(model, was):
    return {size: count for size, count in shape_of(model).items() if count != was[size] and size != "parameters"}


@pytest.mark.parametrize(
    ("family", "unit", "ratio", "left"),
    [
        ("llama", "ffn", 0.25, {"ffn": 96}),
        ("llama", "kv_group", 0.5, {"kv_heads": 2, "heads": 4}),
        ("llama", "head", 0.5, {"heads": 4}),
        ("llama", "head", 0.3, {"heads": 4}),  # as many for each of four key-value heads
        ("llama", "hidden", 0.3, {"hidden": 40}),  # a multiple of the heads
        ("llama", "layer", 0.3, {"layers": 2}),
        ("llama tied", "head", 0.25, {"heads": 4, "kv_heads": 4}),  # a divisor of the 64 channels
        ("llama tied", ["head", "hidden"], 0.25, {"heads": 6, "kv_heads": 6, "hidden": 48}),
        ("gpt2", ["head", "hidden"], 0.25, {"heads": 6, "kv_heads": 6, "hidden": 48}),  # 8 channels for each head
        ("bert", ["head", "hidden", "ffn"], 0.5, {"heads": 4, "kv_heads": 4, "hidden": 32, "ffn": 64}),
        ("qwen3", ["ffn", "layer"], 0.34, {"ffn": 88, "layers": 2}),  # in steps of 128 / 16 units
        ("qwen3", "ffn", 0.95, {"ffn": 8}),
    ],
)
def test_a_ratio_takes_the_same_share_of_every_kind_as_far_as_the_configuration_can_say_it(
    family, unit, ratio, left, data
):
    model = HF[family]()
    was = shape_of(model)
    structured_(model, data, unit=unit, ratio=ratio)
    assert changed(model, was) == left


def test_the_units_of_the_highest_scores_stay_in_every_layer(data):
    model = llama()
    scores = scores_of(model, data, "magnitude", "ffn")
    keep = plan(model, scores, Target(ratio=0.25))
    for name, scores_U in scores.items():
        assert keep[name] == sorted(scores_U.topk(96).indices.tolist())
    by_hand = copy.deepcopy(model)
    shrink_(by_hand, keep)
    record = structured_(model, criterion="magnitude", ratio=0.25)
    assert torch.equal(model(data[0]).logits, by_hand(data[0]).logits)
    again = llama()
    replay_(again, record)
    assert shape_of(again) == shape_of(model)


def test_of_grouped_query_heads_the_best_of_each_key_value_head_stays():
    model = llama()
    scores = {group.name: torch.tensor([5.0, 9, 1, 0, 3, 3, 7, 8]) for group in structure_of(model, "head")}
    assert set(map(tuple, plan(model, scores, Target(ratio=0.5)).values())) == {(1, 2, 4, 7)}


@pytest.mark.parametrize("unit", ["ffn", ["ffn", "layer"], ["ffn", "hidden", "head"]])
@pytest.mark.parametrize("share", [0.9, 0.55])
def test_as_many_parameters_stay_as_there_is_room_for(unit, share, data):
    model = llama()
    limit = int(share * shape_of(model)["parameters"])
    scores = scores_of(model, data, "activation", unit)
    shape = target_shape(model, scores, Target(parameters=limit))
    shrink_(model, plan(model, scores, Target(parameters=limit)))
    assert {size: shape_of(model)[size] for size in shape} == shape
    eight_more = 8 * 3 * shape.get("layers", LAYERS) * shape_of(model)["hidden"]
    assert limit - eight_more < shape_of(model)["parameters"] <= limit


def test_as_many_operations_stay_as_there_is_room_for(data):
    model = llama()
    limit = 0.7 * flops_per_token(model, 64)
    structured_(model, data, unit="ffn", flops=limit, context=64)
    assert limit - 8 * 2 * 3 * 64 * LAYERS < flops_per_token(model, 64) <= limit


def test_a_shape_is_met_exactly(data):
    model = llama()
    shape = {"ffn": 100, "heads": 4, "kv_heads": 2, "hidden": 40, "layers": 2}
    structured_(model, data, shape=shape)
    assert {size: shape_of(model)[size] for size in shape} == shape
    assert model(data[0]).logits.isfinite().all()


def test_ours_with_different_layers_is_counted_by_the_layers_that_go(data):
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    model = SLMForCausalLM(SLMConfig(**sizes, pattern="attn/mlp*2 attn/gelu_mlp*2"))
    scores = {"layer": torch.tensor([0.0, 3.0, 2.0, 1.0])}
    limit = shape_of(model)["parameters"] - 10000
    shrink_(model, plan(model, scores, Target(parameters=limit)))
    assert shape_of(model)["parameters"] <= limit
    assert model.config.pattern == "attn/mlp attn/gelu_mlp*2"


def test_scores_that_were_kept_serve_another_target_without_another_forward_pass(tmp_path, data):
    model = llama()
    save_file(scores_of(model, data, "activation", ["ffn", "layer"]), tmp_path / "scores.safetensors")
    scores = load_file(tmp_path / "scores.safetensors")
    for target, left in ((Target(ratio=0.5), 64), (Target(shape={"ffn": 40, "layers": 3}), 40)):
        smaller = copy.deepcopy(model)
        shrink_(smaller, plan(smaller, scores, target))
        assert shape_of(smaller)["ffn"] == left


def test_the_way_from_one_shape_to_another_goes_over_shapes_that_can_be():
    model = HF["llama tied"]()
    scores = scores_of(model, (), "magnitude", ["hidden", "layer"])
    start, end = {"hidden": 64, "layers": 3}, {"hidden": 16, "layers": 1}
    way = [on_the_way(model, scores, start, end, k, 4) for k in range(5)]
    assert way == [
        {"hidden": 64, "layers": 3},
        {"hidden": 48, "layers": 2},  # multiples of what both ends are multiples of, and of the 8 heads
        {"hidden": 40, "layers": 2},
        {"hidden": 32, "layers": 2},
        {"hidden": 16, "layers": 1},
    ]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "Give exactly one of ratio, parameters, flops and shape, not none"),
        ({"ratio": 0.5, "parameters": 10}, "exactly one of .*'ratio': 0.5, 'parameters': 10"),
        ({"ratio": 1.0}, "ratio=1.0 is a share of the units: it must lie between 0 and 1"),
        ({"ratio": 0.001}, "ratio=0.001 of 128 ffn rounds to nothing"),
        ({"shape": {}}, "shape has nothing in it"),
        ({"shape": {"width": 3}}, "shape has 'width', which is no size; it may name 'layers'"),
        ({"shape": {"ffn": 129}}, "shape has ffn=129, but the model has 128"),
        ({"shape": {"heads": 6}}, "shape has heads=6, of which the 4 key-value heads cannot have equal parts"),
        ({"shape": {"hidden": 50}}, "LlamaConfig cannot say what would be left"),
        ({"unit": ["head", "kv_group"], "ratio": 0.5}, "with a 'kv_group' its query heads go"),
        ({"unit": "neuron", "ratio": 0.5}, "unit='neuron' must be one of"),
        ({"parameters": 10**9}, "is no less than the 123,328 that the model has"),
        ({"parameters": 100}, "cannot be reached by removing ffn.*the model still has 54,208. Give that or more"),
        ({"flops": 1e5, "unit": "layer"}, "flops=100000 cannot be reached by removing layers"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_changed(arguments, complaint, data):
    model = llama()
    was = shape_of(model)
    with pytest.raises(ValueError, match=complaint):
        structured_(model, data, **arguments)
    assert shape_of(model) == was


def test_a_unit_that_cannot_go_alone_is_refused_and_not_left_out(data):
    with pytest.raises(ValueError, match="remove 'head' and 'hidden' at once"):
        structured_(HF["gpt2"](), data, unit=["ffn", "hidden"], ratio=0.5)


def test_scores_of_another_model_are_refused(data):
    model = llama()
    scores = scores_of(model, data, "activation", "ffn")
    structured_(model, data, ratio=0.5)
    with pytest.raises(ValueError, match=r"has 64 units, but scores of shape .128,.; score the model as it is now"):
        plan(model, scores, Target(ratio=0.5))


@pytest.fixture(scope="module")
def learner():
    """A model that has learned to count with two clocks, in a few seconds; and data that it has not seen."""

    def texts(seed):
        g = torch.Generator().manual_seed(seed)
        start, step = torch.randint(96, (64, 1), generator=g), torch.randint(1, 6, (64, 1), generator=g)
        return (start + step * torch.arange(16)) % 96

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(250):
        ids = texts(step)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval(), texts


@torch.no_grad()
def loss_of(model, ids):
    return model(ids, labels=ids).loss.item()


@pytest.mark.parametrize(("unit", "ratio"), [("ffn", 0.4), ("head", 0.34), ("hidden", 0.125), ("layer", 0.34)])
def test_of_a_trained_model_judged_units_cost_less_than_those_drawn_by_lot(learner, unit, ratio):
    model, texts = learner
    calibration, unseen = list(texts(1000).split(8)), texts(2000)
    dense = loss_of(model, unseen)

    def cost(criterion, seed=0):
        smaller = copy.deepcopy(model)
        structured_(smaller, calibration, unit=unit, criterion=criterion, ratio=ratio, seed=seed)
        return loss_of(smaller, unseen) - dense

    by_lot = sum(cost("random", seed) for seed in range(8)) / 8
    for criterion in ("activation", "taylor", "taylor2", *(["loss"] if unit == "layer" else [])):
        assert cost(criterion) < by_lot, criterion


@pytest.mark.parametrize("make", [tiny_llama, tiny_slm])
def test_what_comes_out_is_loaded_as_any_model_of_its_family(tmp_path, make, data):
    model = make()
    structured_(model, data, unit=["ffn", "hidden", "layer"], ratio=0.5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(data[0]).logits, model(data[0]).logits)
