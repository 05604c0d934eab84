"""Smaller models: the cut model against the masked big one, and against a fresh one of its configuration."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from pruning_families import FAMILIES, HF, TIED_WIDTHS, answer, close, family, keeps, some, tokens
from support import ForeignLlama, differences, tiny_llama, tiny_slm
from torch import nn

from lightning_slm.models import SLMForCausalLM
from lightning_slm.pruning import gated, replay_, shape_of, shrink_, structure_of

COMBINATIONS = [
    ["head"], ["kv_group"], ["ffn"], ["hidden"], ["layer"], ["head", "hidden"], ["kv_group", "ffn"],
    ["head", "kv_group", "ffn", "hidden", "layer"],
]  # fmt: skip


# In GPT-2 and BERT, heads and channels go together or not at all: see REFUSED.
EVERY_CUT = pytest.mark.parametrize(
    ("name", "units"),
    [
        pytest.param(name, units, id=f"{name}-{'+'.join(units)}")
        for name in FAMILIES
        for units in COMBINATIONS
        if name not in TIED_WIDTHS or len({"head", "kv_group", "hidden"} & set(units)) != 1
    ],
)


def cut(model, units):
    """The model cut at random, what was kept, and the record."""
    keep = keeps(model, units)
    if set(units) >= {"head", "kv_group"} and shape_of(model)["heads"] == shape_of(model)["kv_heads"]:
        keep |= {name: torch.ones(8, dtype=torch.bool) for name in keep if name.endswith("/kv_group")}
    small = copy.deepcopy(model)
    return small, keep, shrink_(small, keep)


@EVERY_CUT
def test_the_cut_model_computes_what_the_masked_one_computes(name, units):
    for seed in range(3):
        torch.manual_seed(seed)
        model, ids = family(name), tokens()
        small, keep, _ = cut(model, units)
        with gated(model, {group: mask.float() for group, mask in keep.items()}):
            masked = answer(model, ids)
        if name == "bert" and "hidden" in keep:
            masked = masked[:, keep["hidden"]]
        assert close(answer(small, ids), masked)
        assert not close(answer(model, ids)[..., : masked.shape[-1]], masked, 1e-3)


@EVERY_CUT
def test_the_configuration_makes_a_model_of_the_same_shapes(name, units):
    small, _, _ = cut(family(name), units)
    config = type(small.config).from_dict(small.config.to_dict())
    fresh = type(small)(config).eval()
    assert fresh.load_state_dict(small.state_dict()) == nn.modules.module._IncompatibleKeys([], [])
    ids = tokens()
    assert torch.equal(answer(fresh, ids), answer(small, ids))
    assert repr(fresh) == repr(small)  # in_features and their like
    assert shape_of(fresh) == shape_of(small)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in HF])
def test_our_models_are_saved_and_loaded_as_they_are(name, tmp_path):
    small, _, _ = cut(family(name), COMBINATIONS[-1])
    small.save_pretrained(tmp_path)
    ids = tokens()
    assert torch.equal(answer(type(small).from_pretrained(tmp_path).eval(), ids), answer(small, ids))


@pytest.mark.slow
def test_other_processes_load_the_small_models_without_this_package(tmp_path):
    ids = tokens()
    for name in HF:
        small, _, _ = cut(family(name), COMBINATIONS[-1])
        small.save_pretrained(tmp_path / name)
        torch.save(
            {"class": type(small).__name__, "ids": ids, "answer": answer(small, ids)}, tmp_path / name / "said.pt"
        )
    script = """
import pathlib, sys, torch, transformers
for folder in pathlib.Path(sys.argv[1]).iterdir():
    said = torch.load(folder / "said.pt")
    model, seen = getattr(transformers, said["class"]).from_pretrained(folder, output_loading_info=True)
    assert not (seen["missing_keys"] or seen["unexpected_keys"] or seen["mismatched_keys"]), seen
    with torch.no_grad():
        output = model.eval()(said["ids"])
    assert torch.equal(output.logits if hasattr(output, "logits") else output.pooler_output, said["answer"]), folder
assert not any(name.startswith("lightning") for name in sys.modules)
print("all the same")
"""
    run = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=240)
    assert "all the same" in run.stdout, run.stderr[-3000:]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "slm", "slm windows", "slm hybrid"])
def test_a_small_model_generates_with_its_cache_as_without(name):
    small, _, _ = cut(family(name), COMBINATIONS[-1])
    ids = tokens()
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(small.generate(ids, use_cache=True, **how), small.generate(ids, use_cache=False, **how))
    indices = [m.layer_idx for m in small.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    assert indices in ([], [0, 1])


@pytest.mark.parametrize("name", ["llama tied", "gpt2", "bert masked", "slm shared"])
def test_gradients_of_what_stays_are_those_of_the_masked_model(name):
    model, ids = family(name), tokens()
    small, keep, _ = cut(model, ["head", "hidden", "ffn"])
    small(ids).logits.square().mean().backward()
    with gated(model, {group: mask.float() for group, mask in keep.items()}):
        model(ids).logits.square().mean().backward()
    shrink_(model, keep)  # and the gradients with it
    for (name_, p), q in zip(model.named_parameters(), small.parameters()):
        if not name_.endswith("key.bias"):  # softmax does not see it: its gradient is rounding noise
            assert close(q.grad, p.grad, 1e-4), name_


def test_weights_are_cut_where_the_units_are():
    model = family("llama tied")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    h, d = torch.tensor([0, 3, 5, 6]), torch.tensor([1, 2, 30, 63, *range(32, 60)]).unique()
    keep = {f"model.layers.{i}.self_attn/head": h for i in range(3)}
    shrink_(model, {**keep, "hidden": d})
    rows = torch.cat([torch.arange(8) + 8 * i for i in h.tolist()])
    after = dict(model.named_parameters())
    q, o = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(after[q], before[q][rows][:, d])
    assert torch.equal(after[o], before[o][d][:, rows])
    embedding = "model.embed_tokens.weight"
    assert torch.equal(after[embedding], before[embedding][:, d])
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"][d])


def test_tied_weights_stay_tied_and_parameters_keep_their_identity():
    for model in (tiny_llama(), tiny_slm()):
        before = {n: p for n, p in model.named_parameters()}
        shrink_(model, {"hidden": range(32)})
        assert all(p is before[n] for n, p in model.named_parameters())
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_parameters_are_counted_by_hand():
    small, _, _ = cut(family("qwen3"), COMBINATIONS[-1])
    D, d, H, K, ffn, V = 32, 16, 2, 2, 50, 96
    assert shape_of(small) == {
        "layers": 2, "hidden": D, "heads": H, "kv_heads": K, "head_dim": d, "ffn": ffn,
        "parameters": 2 * V * D + D + 2 * (2 * D + 2 * d + D * d * (H + 2 * K) + H * d * D + 3 * D * ffn),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "slm windows", "qwen2"])
def test_cutting_twice_is_cutting_once(name):
    model = family(name)
    once = copy.deepcopy(model)
    first = {g.name: some(g.size, g.size * 3 // 4, 1) for g in structure_of(model, ["ffn", "hidden", "kv_group"])}
    record = shrink_(model, first)
    record += shrink_(model, {"layer": [0, 2]})
    second = {g.name: some(g.size, 24) for g in structure_of(model, ["ffn", "hidden"])}
    record += shrink_(model, second)
    both = {}
    for name_, mask in first.items():  # layer 2 has become layer 1
        later = second.get(name_.replace("layers.2", "layers.1")) if "layers.1" not in name_ else None
        kept = mask.nonzero().flatten()
        both[name_] = kept if later is None else kept[later]
    shrink_(once, {**both, "layer": [0, 2]})
    assert not differences(once.state_dict(), model.state_dict())
    assert once.config.to_dict() == model.config.to_dict()
    assert len(record) == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_a_record_rebuilds_the_structure_before_the_weights_come(name):
    small, _, record = cut(family(name), COMBINATIONS[-1])
    record += shrink_(small, {g.name: range(g.size - 1) for g in structure_of(small, "ffn")})
    fresh = FAMILIES[name]().eval()
    replay_(fresh, json.loads(json.dumps(record)))
    fresh.load_state_dict(small.state_dict())
    ids = tokens()
    assert torch.equal(answer(fresh, ids), answer(small, ids))
    with pytest.raises(ValueError, match=r"Step 0 of the record was done to \d+ units of .*, of which this model has"):
        replay_(fresh, record)


def test_a_record_rebuilds_a_model_that_has_no_storage_yet():
    small, _, record = cut(family("llama"), COMBINATIONS[-1])
    with torch.device("meta"):
        fresh = FAMILIES["llama"]()
    replay_(fresh, record)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    assert all(p.is_meta for p in fresh.parameters())


def test_a_network_inside_a_module_is_cut_in_place():
    module = ForeignLlama()
    record = shrink_(module, {g.name: range(16) for g in structure_of(module, "ffn")})
    assert module.net.config.intermediate_size == 16
    assert module.net.model.layers[1].mlp.intermediate_size == 16
    assert list(record[0]["of"].values()) == [64, 64]


def trained(model, optimizer, steps=2):
    for seed in range(steps):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(tokens()).logits.logsumexp(-1).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_optimizer_states_are_cut_with_the_weights(kind):
    model = family("llama tied").train()
    how = {"lr": 1e-3, "momentum": 0.9} if kind == "SGD" else {"lr": 1e-3}
    optimizer = getattr(torch.optim, kind)(model.parameters(), **how)
    trained(model, optimizer)
    p = model.model.layers[2].mlp.down_proj.weight
    state = {n: s.clone() for n, s in optimizer.state[p].items()}
    gradient = p.grad.clone()
    keep = {"hidden": some(64, 32), "layer": torch.tensor([True, False, True])}
    keep |= {f"model.layers.{i}.mlp/ffn": some(128, 64) for i in range(3)}
    shrink_(model, keep, [optimizer])
    for name, before in state.items():
        now = optimizer.state[p][name]
        cut_ = before[keep["hidden"]][:, keep["model.layers.2.mlp/ffn"]] if before.ndim else before
        assert torch.equal(now, cut_), name
    assert torch.equal(p.grad, gradient[keep["hidden"]][:, keep["model.layers.2.mlp/ffn"]])
    assert {id(q) for g in optimizer.param_groups for q in g["params"]} == {id(q) for q in model.parameters()}
    assert set(optimizer.state) == set(model.parameters())
    trained(model, optimizer)  # goes on
    again = getattr(torch.optim, kind)(model.parameters(), **how)
    again.load_state_dict(optimizer.state_dict())


def test_a_graph_that_is_still_held_does_not_disturb():
    model, ids = tiny_llama().train(), tokens()
    held = model(ids).logits.sum()
    held.backward(retain_graph=True)
    shrink_(model, {g.name: range(g.size // 2) for g in structure_of(model, ["ffn", "hidden"])})
    model.zero_grad()
    model(ids).logits.sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_ours_say_in_their_pattern_which_blocks_stay():
    model = family("slm windows")
    shrink_(model, {"layer": [0, 2]})
    assert (model.config.pattern, model.config.sliding_window) == ("attn/relu_mlp swa/smooth_mlp", 4)
    shrink_(model, {"layer": [0]})
    assert (model.config.pattern, model.config.sliding_window, model.config.num_hidden_layers) == (
        "attn/relu_mlp",
        None,
        1,
    )
    model = family("slm shared")
    shrink_(model, {"layer": [1, 2]})
    assert (model.config.pattern, model.config.num_hidden_layers) == ("attn/mlp@one*2", 4)  # each runs twice
    model = family("slm hybrid")
    shrink_(model, {"layer": [1]})
    assert (model.config.pattern, model.config.mixers) == ("attn/mobilebert_ffn", None)


def test_a_mixer_that_no_block_shares_any_more_goes():
    kind = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    model = SLMForCausalLM(type(tiny_slm().config)(**kind, pattern="attn/mlp@a attn/mlp@b*2"))
    shrink_(model, {"layer": [1, 2]})
    assert list(model.model.shared) == ["mlp@b"]


def test_layers_that_go_take_their_heads_and_units_with_them():
    model = family("llama")
    keep = {g.name: [] if g.layer == 1 else range(7) for g in structure_of(model, "ffn")}
    shrink_(model, {**keep, "layer": [0, 2]})
    assert (shape_of(model)["layers"], shape_of(model)["ffn"]) == (2, 7)


def heads(kept):
    return {f"model.layers.{i}.self_attn/head": k for i, k in enumerate(kept)}


def ffn(kept):
    return {f"model.layers.{i}.mlp/ffn": k for i, k in enumerate(kept)}


H = [0, 2, 4, 6]  # one of each two
REFUSED = {
    "unequal layers": ("llama", ffn([[0, 1], [0, 1, 2], [0, 1]]), r"mlp' would have 2 .*layers.1.mlp' 3, but a config"),
    "forgotten layers": ("llama", ffn([[0, 1], [3, 4]]), r"layers.2.mlp' 128, .*groups that are not given stay whole"),
    "unequal runs": ("llama", heads([H, H, [0, 1, 2, 4, 6]]), r"layers.2.self_attn': \[2, 1, 1, 1\] query heads"),
    "an empty run": ("llama", heads([[0, 1, 2, 3]] * 3), r"\[2, 2, 0, 0\] query heads"),
    "nothing": ("llama", ffn([[], [], []]), "layers.0.mlp/ffn': nothing would be left"),
    "no layer": ("llama", {"layer": torch.zeros(3, dtype=torch.bool)}, "'layer': nothing would be left"),
    "a rule of Llama's": (
        "llama",
        {"hidden": range(60)},
        r"LlamaConfig cannot say .*hidden_size=60[^!]*not a multiple",
    ),
    "heads of BERT alone": ("bert", {f"encoder.layer.{i}.attention.self/head": H for i in range(3)}, "4 heads and 64"),
    "channels of GPT-2 alone": ("gpt2", {"hidden": range(32)}, "here 8. 8 heads and 32 channels do not fit together"),
    "a mask of another size": ("llama", {"hidden": torch.ones(63, dtype=torch.bool)}, r"bool mask of shape \(64,\)"),
    "an index too many": ("llama", {"hidden": [0, 64]}, r"'hidden': keep=\[0, 64\] must be .* indices from 0 to 63"),
    "scores for a mask": ("llama", {"hidden": torch.rand(64)}, "must be a bool mask"),
    "no such group": ("llama", {"model.layers.0.mlp/fnn": [0]}, r"no group of units.*layers.0.mlp/ffn"),
    "a width of Mamba-2's": ("slm hybrid", {"hidden": range(49)}, "mamba2: no expand makes 8 heads"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_said_is_refused_before_anything_changes(case):
    name, keep, message = REFUSED[case]
    model = family(name)
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        shrink_(model, keep)
    assert not differences(model.state_dict(), before)
    assert model.config.to_dict() == config


def test_an_optimizer_whose_states_cannot_be_cut_is_refused_before_anything_changes():
    model = family("llama").train()
    optimizer = transformers.Adafactor(model.parameters())
    trained(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"Adafactor keeps 'exp_avg_sq_row' of shape .*Shrink before the first step"):
        shrink_(model, ffn([[0, 1]] * 3), [optimizer])
    assert not differences(model.state_dict(), before)


def test_frozen_weights_are_cut_and_stay_frozen():
    model = tiny_llama().requires_grad_(False)
    shrink_(model, {"hidden": range(32)})
    assert not any(p.requires_grad for p in model.parameters())


def test_half_precision_is_kept():
    model = tiny_llama().bfloat16()
    shrink_(model, {"hidden": range(32)})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
