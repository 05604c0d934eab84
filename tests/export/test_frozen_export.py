"""Models with bitsandbytes' codes as folders: transformers' own, which load without us."""

import json
import warnings

import bitsandbytes
import pytest
import torch
import transformers
from support import tiny_llama, tiny_slm

from lightning_slm.export import folder_bytes, save_hf_folder
from lightning_slm.quantization import llm_int8_, nf4_, prepare_qat_
from lightning_slm.quantization.bnb import dequantize_

IDS = torch.arange(16)[None]


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("freeze", "quick"), [(nf4_, "train"), (llm_int8_, "eval")])
def test_a_folder_of_frozen_weights_loads_in_transformers_without_us(tmp_path, freeze, quick, tied):
    model = tiny_llama(tied)
    freeze(model)
    saved = save_hf_folder(model, tmp_path / "frozen")
    assert saved.quantized
    assert saved.difference < 1e-4
    again = load(tmp_path / "frozen")
    getattr(again, quick)()  # the mode in which bitsandbytes' layer does on this CPU what it does on a GPU
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "MatMul8bitLt: inputs will be cast")
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    kinds = {nf4_: bitsandbytes.nn.Linear4bit, llm_int8_: bitsandbytes.nn.Linear8bitLt}
    assert sum(isinstance(m, kinds[freeze]) for m in again.modules()) == 14
    config = json.loads((tmp_path / "frozen/config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == ["lm_head"]


def test_frozen_weights_take_less_than_a_third_of_the_plain_folder(tmp_path):
    plain = save_hf_folder(tiny_slm(), tmp_path / "plain")
    model = tiny_slm()
    nf4_(model)
    frozen = save_hf_folder(model, tmp_path / "frozen")
    assert frozen.bytes == folder_bytes(tmp_path / "frozen")
    layers = 4 * sum(p.numel() for p in tiny_slm().model.layers.parameters() if p.ndim == 2)
    assert frozen.bytes < plain.bytes - 0.66 * layers


def test_in_full_precision_nf4_is_written_as_what_it_stands_for_and_int8_is_refused(tmp_path):
    model = tiny_llama()
    nf4_(model)
    assert not save_hf_folder(model, tmp_path / "plain", quantized=False).quantized
    assert torch.equal(load(tmp_path / "plain")(IDS).logits, model(IDS).logits)
    model = tiny_llama()
    llm_int8_(model)
    with pytest.raises(ValueError, match=r"does not round its inputs, and .*q_proj.* does: pack it, or call"):
        save_hf_folder(model, tmp_path / "int8", quantized=False)
    dequantize_(model)
    assert save_hf_folder(model, tmp_path / "int8", quantized=False).difference == 0.0


def test_codes_of_two_kinds_do_not_go_into_one_folder(tmp_path):
    model = tiny_llama()
    nf4_(model, targets="*mlp*")
    prepare_qat_(model, targets="*attn*", embedding=None)
    with pytest.raises(ValueError, match=r"bitsandbytes' codes cannot hold those of '.*self_attn"):
        save_hf_folder(model, tmp_path / "both")
