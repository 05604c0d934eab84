"""Exported folders: what is in them, that they load as users load them, and that nothing half-written is left."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import tiny_llama as llama
from support import tiny_slm as ours
from tokenizers import Tokenizer, models
from torch import nn

import lightning_slm.export.huggingface as huggingface
from lightning_slm.export import folder_bytes, save_hf_folder
from lightning_slm.nn.targets import weight_targets
from lightning_slm.pruning import magnitude_
from lightning_slm.quantization import (
    SCHEMES,
    PackedEmbedding,
    PackedLinear,
    convert_qat_,
    prepare_qat_,
    quantize_layer,
)
from lightning_slm.quantization.packed import unpack

IDS = torch.arange(24).reshape(2, 12)


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def tokenizer():
    words = {chr(97 + i): i for i in range(26)}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")))


@pytest.mark.parametrize("make", [ours, llama])
def test_a_plain_model_comes_back_with_its_tokenizer_and_generates_the_same(make, tmp_path, tokenizer):
    model = make()
    done = save_hf_folder(model, tmp_path / "out", tokenizer)
    again = load(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(again.generate(IDS, max_new_tokens=5), model.generate(IDS, max_new_tokens=5))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()
    assert (done.folder, done.quantized, done.difference) == (tmp_path / "out", False, 0.0)
    assert done.bytes == folder_bytes(tmp_path / "out") == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("embedding", ["int8", "int4", None])
@pytest.mark.parametrize("make", [ours, llama, lambda: ours(tied=False)], ids=["ours", "llama", "untied"])
def test_a_packed_model_computes_exactly_what_the_trained_one_did(make, scheme, embedding, tmp_path):
    model = make()
    prepare_qat_(model, scheme, embedding=embedding)
    model.train()
    done = save_hf_folder(model, tmp_path / "out")
    assert model.training, "the model is left in the mode it was in"
    again = load(tmp_path / "out")
    assert torch.equal(logits(again), logits(model.eval()))
    assert (done.quantized, done.difference) == (True, 0.0)
    assert type(model).from_pretrained(tmp_path / "out").dtype == torch.float32
    assert torch.equal(again.generate(IDS, max_new_tokens=5), model.generate(IDS, max_new_tokens=5))


def test_the_file_holds_the_exact_codes_in_so_many_bits_and_a_tied_head_once(tmp_path):
    model = ours()
    prepare_qat_(model, "int8_act_int4_weight", embedding="int8")
    save_hf_folder(model, tmp_path / "out")
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(key.startswith("lm_head") for key in held)
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "quant") and name != "lm_head"}
    for name, layer in layers.items():
        codes, scale = quantize_layer(layer)
        assert torch.equal(unpack(held[f"{name}.weight"], layer.quant.bits), codes)
        assert torch.equal(held[f"{name}.weight_scale"], scale)
    weights = sum(t.numel() * t.element_size() for t in held.values())
    linear = sum(m.weight.numel() for m in layers.values() if isinstance(m, nn.Linear))
    rest = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert weights == linear * (4 / 8 + 2 / 32) + 96 * 64 * (1 + 2 / 32) + rest * 4


def test_a_quantised_file_is_a_fraction_of_the_dense_one(tmp_path):
    model = ours()
    dense = save_hf_folder(model, tmp_path / "dense").bytes
    prepare_qat_(model, "int4_weight", embedding="int4")
    save_hf_folder(model, tmp_path / "packed")
    file = "model.safetensors"
    assert dense > 100_000
    assert (tmp_path / "packed" / file).stat().st_size < (tmp_path / "dense" / file).stat().st_size / 5


def test_converted_models_and_loaded_ones_are_written_the_same(tmp_path):
    model = ours()
    prepare_qat_(model, embedding="int4")
    save_hf_folder(model, tmp_path / "a")
    save_hf_folder(load(tmp_path / "a"), tmp_path / "b")
    convert_qat_(model)
    save_hf_folder(model, tmp_path / "c")
    first, *others = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[key], first[key]) for key in first)
    for codes_only in (model, load(tmp_path / "a")):
        with pytest.raises(ValueError, match="only the codes are left"):
            save_hf_folder(codes_only, tmp_path / "d", quantized=False)


def test_zeros_of_pruning_are_in_the_file(tmp_path):
    model = ours()
    magnitude_(model, sparsity=0.5, group=4)
    prepare_qat_(model)
    save_hf_folder(model, tmp_path / "out")
    again = load(tmp_path / "out")
    for name, module in again.named_modules():
        if isinstance(module, PackedLinear) and name != "lm_head":
            zeros = module.dequantized().reshape(-1, 4) == 0
            assert (zeros.sum(1) >= 2).all()


def test_loaded_layers_stay_packed_in_memory_and_share_the_tied_codes(tmp_path):
    model = llama()
    prepare_qat_(model)
    save_hf_folder(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert isinstance(again.lm_head, PackedLinear)
    assert isinstance(again.model.embed_tokens, PackedEmbedding)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.lm_head.weight_scale is again.model.embed_tokens.weight_scale
    held = {t.data_ptr(): t.numel() * t.element_size() for t in (*again.parameters(), *again.buffers())}
    dense = sum(p.numel() * 4 for p in llama().parameters())
    assert sum(held.values()) < dense / 4


def test_loaded_in_bfloat16_it_answers_in_bfloat16(tmp_path):
    model = ours()
    prepare_qat_(model, "int4_weight")
    save_hf_folder(model, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert logits(again).dtype == torch.bfloat16
    assert (logits(again).float() - logits(model)).abs().max() < 0.05 * logits(model).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["lightning_slm", "transformers"])
def test_a_fresh_python_needs_only_to_import_the_package_before_or_after_transformers(first, tmp_path):
    model = ours()
    prepare_qat_(model)
    save_hf_folder(model, tmp_path / "out")
    code = (
        f"import {first}; from transformers import AutoModelForCausalLM; import lightning_slm;"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r});"
        "print(type(m).__name__, type(m.lm_head).__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["SLMForCausalLM", "PackedLinear"], ran.stderr


def test_full_precision_on_request_is_the_weights_behind_the_codes(tmp_path):
    model = ours()
    plain = logits(model)
    prepare_qat_(model, "int2_weight")
    done = save_hf_folder(model, tmp_path / "out", quantized=False)
    assert not done.quantized
    assert torch.equal(logits(load(tmp_path / "out")), plain)
    assert not torch.equal(logits(model), plain), "the model itself still rounds"


def test_what_cannot_be_exported_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="the model was not prepared; call prepare_qat_"):
        save_hf_folder(ours(), tmp_path / "out", quantized=True)
    with pytest.raises(ValueError, match="A Sequential is no"):
        save_hf_folder(nn.Sequential(nn.Linear(2, 2)), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something that is no export"):
        save_hf_folder(ours(), tmp_path / "mine")
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "thesis.tex"]


def test_an_earlier_export_is_replaced_as_a_whole(tmp_path):
    save_hf_folder(ours(), tmp_path / "out")
    (tmp_path / "out" / "old.txt").write_text("of the old one")
    model = ours()
    save_hf_folder(model, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    assert not (tmp_path / "out" / "old.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failure", ["disk", "codes", "logits"])
def test_whatever_fails_leaves_the_old_folder_as_it_was_and_nothing_beside_it(failure, tmp_path, monkeypatch):
    old = ours()
    save_hf_folder(old, tmp_path / "out")
    model = ours()
    prepare_qat_(model)

    def write(state, path, metadata):
        if failure == "disk":
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        if failure == "codes":
            key = next(key for key in state if "layers.0" in key and state[key].dtype == torch.uint8)
            state = {**state, key: state[key] ^ 1}
        save_file(state, path, metadata)

    monkeypatch.setattr(huggingface, "save_file", write)
    if failure == "logits":  # a weight that is used elsewhere than in its layer's forward
        model.register_forward_hook(lambda m, _, out: setattr(out, "logits", out.logits + 1))
    expected = {"disk": "No space left", "codes": r"codes on disk differ.*layers\.0", "logits": "logits differ.*by 1"}
    with pytest.raises((OSError, RuntimeError), match=expected[failure]):
        save_hf_folder(model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert torch.equal(logits(load(tmp_path / "out")), logits(old))


def test_a_damaged_or_foreign_folder_is_named_when_it_is_loaded(tmp_path):
    model = llama()
    prepare_qat_(model)
    folder = save_hf_folder(model, tmp_path / "out").folder
    with pytest.raises(ValueError, match=r"which this LlamaModel has not; load it as one of .*LlamaForCausalLM"):
        transformers.AutoModel.from_pretrained(folder)
    held = load_file(folder / "model.safetensors")
    lost = {key: t for key, t in held.items() if not key.endswith("k_proj.weight_scale")}
    save_file(lost, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"damaged: of '.*k_proj' it holds only the codes"):
        load(folder)
    wrong = {key: t[:, :-1].contiguous() if key.endswith("q_proj.weight") else t for key, t in held.items()}
    save_file(wrong, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        load(folder)


def test_the_config_says_what_is_packed_and_how(tmp_path):
    model = ours()
    prepare_qat_(model, "int8_act_int4_weight", embedding="int8")
    config = json.loads((save_hf_folder(model, tmp_path / "out").folder / "config.json").read_text())
    said = config["quantization_config"]
    assert said["quant_method"] == "lightning_slm"
    alike = {
        (layers["bits"], layers["group"], layers["int8_activations"]): layers["names"] for layers in said["layers"]
    }
    assert sorted(alike[8, 32, False]) == ["lm_head", "model.embed_tokens"]
    assert sorted(alike[4, 32, True]) == sorted(t.module_name for t in weight_targets(model))
    assert not hasattr(model.config, "quantization_config")
