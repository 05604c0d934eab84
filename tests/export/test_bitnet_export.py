"""BitNet's codes on disk: ours, with everything we train, and transformers' own, which loads without us."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import tiny_llama as llama
from support import tiny_slm as ours
from torch import nn

import lightning_slm.export.huggingface as huggingface
import lightning_slm.export.packing as packing
from lightning_slm.export import save_hf_folder
from lightning_slm.quantization import LayerQuant, prepare_qat_
from lightning_slm.quantization.bitnet import BitNet, bit_layers, bitnet_, quantize_bits, set_share_
from lightning_slm.quantization.hf import PackedConfig
from lightning_slm.quantization.int4_kernel import use_int4_kernel_
from lightning_slm.quantization.packed import PackedBitLinear, pack_bits, unpack_bits

BITS = ["1.58", "1"]
IDS = torch.arange(24).reshape(2, 12)


def load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def trained(make=llama, bits="1.58", **kwargs):
    """Ten steps, so that codes are no longer those of the initial weights."""
    model = make()
    bitnet_(model, bits, **kwargs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(10):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sub_norm", [False, True])
@pytest.mark.parametrize("make", [ours, llama, lambda: ours(tied=False)], ids=["ours", "llama", "untied"])
def test_a_packed_model_holds_the_masters_codes_and_computes_exactly_the_same(make, bits, sub_norm, tmp_path):
    model = trained(make, bits, sub_norm=sub_norm)
    model.train()
    done = save_hf_folder(model, tmp_path / "out")
    assert model.training
    assert (done.quantized, done.difference) == (True, 0.0)
    again = load(tmp_path / "out")
    packed = {name: m for name, m in again.named_modules() if isinstance(m, PackedBitLinear)}
    masters = dict(bit_layers(model))
    assert packed.keys() == masters.keys()
    for name, layer in masters.items():
        codes, scale = quantize_bits(layer.weight, bits)
        assert torch.equal(unpack_bits(packed[name].weight, layer.settings), codes)
        assert packed[name].weight_scale.view(torch.float32) == scale
    assert torch.equal(logits(again), logits(model.eval()))
    assert torch.equal(again.generate(IDS, max_new_tokens=5), model.generate(IDS, max_new_tokens=5))


@pytest.mark.parametrize(("bits", "to_a_byte"), [("1.58", 4), ("1", 8)])
def test_the_file_holds_two_bits_or_one_of_each_weight_and_four_bytes_for_the_scale(bits, to_a_byte, tmp_path):
    model = trained(ours, bits)
    held = load_file(save_hf_folder(model, tmp_path / "out").folder / "model.safetensors")
    layers = dict(bit_layers(model))
    bytes_ = {key: t.numel() * t.element_size() for key, t in held.items()}
    for name, layer in layers.items():
        assert bytes_.pop(f"{name}.weight") == layer.weight.numel() / to_a_byte
        assert bytes_.pop(f"{name}.weight_scale") == 4
    rest = [p for name, p in model.named_parameters() if name.removesuffix(".weight") not in layers]
    assert sum(bytes_.values()) == sum(p.numel() * 4 for p in rest)


@pytest.mark.parametrize("where", ["disk", "packing"])
@pytest.mark.parametrize("format", ["lightning_slm", "bitnet"])
def test_a_single_flipped_code_is_refused_and_the_old_folder_stays(where, format, tmp_path, monkeypatch):
    model = trained()
    save_hf_folder(model, tmp_path / "out", format=format)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def flip(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[7] ^= 0b10  # 1 or 3 to the other, 2 to 0
        return tensor

    if where == "disk":
        key = "model.layers.1.mlp.up_proj.weight"
        write = lambda state, path, metadata: save_file({**state, key: flip(state[key])}, path, metadata)  # noqa: E731
        monkeypatch.setattr(huggingface, "save_file", write)
        expected = r"codes on disk differ.*layers\.1\.mlp\.up_proj\.weight"
    elif format == "lightning_slm":
        monkeypatch.setattr(packing, "pack_bits", lambda *args: flip(pack_bits(*args)))
        expected = r"codes loaded differ from those of the weights: model\.layers\.0\.self_attn\.q_proj, "
    else:
        pack = transformers.integrations.bitnet.pack_weights
        monkeypatch.setattr(transformers.integrations.bitnet, "pack_weights", lambda codes: flip(pack(codes)))
        expected = r"codes loaded differ from those of the weights: model\.layers\.0\.self_attn\.q_proj, "
    with pytest.raises(RuntimeError, match=expected):
        save_hf_folder(model, tmp_path / "out", format=format)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_masters_are_written_on_request_and_the_model_goes_on_as_it_was(tmp_path):
    model = trained()
    set_share_(model, 0.5)  # in the middle of a warm-up
    rounded = logits(model)
    done = save_hf_folder(model, tmp_path / "plain", quantized=False)
    assert not done.quantized
    again = load(tmp_path / "plain")
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters()))
    save_hf_folder(model, tmp_path / "packed")
    assert torch.equal(logits(model), rounded)
    set_share_(model, 1.0)
    assert torch.equal(logits(load(tmp_path / "packed")), logits(model)), "what is packed is rounded altogether"


def test_it_shares_a_folder_with_layers_in_groups_and_is_written_again_as_it_was_loaded(tmp_path):
    model = trained(ours)
    prepare_qat_(model, skip="*layers*", embedding="int4")
    save_hf_folder(model, tmp_path / "a")
    again = load(tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    save_hf_folder(again, tmp_path / "b")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_config_json_says_so_and_older_ones_without_a_kind_are_read():
    said = PackedConfig.of({"a": BitNet("1", True), "b": LayerQuant(4, 32, True), "c": BitNet("1", True)}).layers
    assert said == [
        {"kind": "bitnet", "bits": "1", "sub_norm": True, "names": ["a", "c"]},
        {"bits": 4, "group": 32, "int8_activations": True, "names": ["b"]},
    ]
    assert PackedConfig(json.loads(json.dumps(said))).by_name() == {
        "a": BitNet("1", True),
        "c": BitNet("1", True),
        "b": LayerQuant(4, 32, True),
    }


def test_with_the_4_bit_kernel_a_loaded_model_says_the_same_and_is_no_longer_exported(tmp_path):
    model = trained(ours)
    prepare_qat_(model, skip="*layers*", embedding="int8")
    save_hf_folder(model, tmp_path / "out")
    again = load(tmp_path / "out", dtype=torch.bfloat16)
    want = logits(again).float()
    assert "lm_head" in use_int4_kernel_(again)
    assert (logits(again).float() - want).abs().max() < 0.02 * want.abs().max()
    with pytest.raises(ValueError, match="this CPU's layout of their codes; export the model as it was loaded"):
        save_hf_folder(again, tmp_path / "again")


# transformers' own folders.

WITHOUT_US = """
import sys, torch, transformers
from transformers.integrations.bitnet import unpack_weights
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(torch.arange(24).reshape(2, 12)).logits
layers = {n: m for n, m in model.named_modules() if type(m).__name__ == "BitLinear"}
codes = {n: unpack_weights(m.weight, torch.int8) for n, m in layers.items()}
assert "lightning_slm" not in sys.modules
torch.save({"logits": logits, "codes": codes}, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("skip", [(), "*layers.1.mlp.up_proj"], ids=["all", "but one"])
def test_transformers_alone_loads_its_own_format_with_the_same_codes_and_logits(skip, tmp_path):
    model = trained(skip=skip)
    done = save_hf_folder(model, tmp_path / "out", format="bitnet")
    assert done.quantized
    assert done.difference < 1e-4
    # Its functions compile themselves: not needed here, and slow.
    run = [sys.executable, "-c", WITHOUT_US, str(tmp_path / "out"), str(tmp_path / "found.pt")]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    ran = subprocess.run(run, capture_output=True, text=True, timeout=200, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    found = torch.load(tmp_path / "found.pt")
    assert found["codes"].keys() == dict(bit_layers(model)).keys()
    for name, layer in bit_layers(model):
        assert torch.equal(found["codes"][name], quantize_bits(layer.weight, "1.58")[0])
    assert (found["logits"] - logits(model.eval())).abs().max() < 1e-4


def test_what_transformers_format_cannot_hold_is_refused_with_the_way_out(tmp_path):
    def refused(model, match, **kwargs):
        with pytest.raises(ValueError, match=match):
            save_hf_folder(model, tmp_path / "out", **{"format": "bitnet", **kwargs})

    refused(llama(), "no layer is BitNet's; call bitnet_")
    refused(trained(ours), "a SLMForCausalLM it has not: train such a model")
    refused(trained(bits="1"), r"'model.layers.0.self_attn.q_proj' computes as BitNet\(bits='1'")
    refused(trained(sub_norm=True), "sub_norm=True.*write our own format")
    refused(trained(), "leave it out with quantized=False", quantized=False)
    refused(trained(), "format='gguf' must be", format="gguf")
    refused(trained(sub_norm=True), "a plain layer has no sub_norm", quantized=False, format="lightning_slm")
    mixed = trained()
    prepare_qat_(mixed, skip="*layers*")
    refused(mixed, "cannot hold the codes of 'model.embed_tokens'")
    odd = trained()
    odd.model.layers[0].mlp.up_proj.out_features = 127
    refused(odd, "with 127 outputs.*in fours")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_no_hugging_face_one_is_still_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    bitnet_(model)
    with pytest.raises(ValueError, match="A Sequential is no"):
        save_hf_folder(model, "out")
