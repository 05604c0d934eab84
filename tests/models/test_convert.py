"""What only Llama does: ours becomes one again. (What all architectures do: test_convert_from_hf.py.)"""

# Shape letters: B = batch, T = tokens.

import pytest
import torch
from hf_models import KINDS, V, hf_model
from mixers import tokens
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from lightning_slm.models import SLMConfig, SLMForCausalLM


@pytest.fixture(params=KINDS["llama"].shapes)
def theirs(request):
    return hf_model("llama", request.param)


def test_the_text_of_beams_is_llamas(theirs):
    ids_BT, how = tokens(), {"max_new_tokens": 20, "do_sample": False, "num_beams": 3}
    assert torch.equal(SLMForCausalLM.from_hf(theirs).generate(ids_BT, **how), theirs.generate(ids_BT, **how))


def test_there_and_back_is_bit_identical(theirs):
    back = SLMForCausalLM.from_hf(theirs).to_hf()
    assert type(back) is LlamaForCausalLM
    assert list(back.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), theirs.state_dict().values()))
    ours, original = back.config.to_dict(), theirs.config.to_dict()
    assert {k: ours[k] for k in original if k != "architectures"} == {
        k: v for k, v in original.items() if k != "architectures"
    }


def test_a_folder_of_what_came_from_a_folder_is_a_llama_again(theirs, tmp_path):
    ids_BT = tokens()
    theirs.save_pretrained(tmp_path / "llama")
    ours = SLMForCausalLM.from_hf(tmp_path / "llama")
    ours.to_hf().save_pretrained(tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(back) is LlamaForCausalLM
    assert torch.equal(back(ids_BT).logits, theirs(ids_BT).logits)


def test_the_precision_of_the_weights_is_kept():
    ours = SLMForCausalLM.from_hf(hf_model("llama", "heads grouped, untied").to(torch.bfloat16))
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in ours.to_hf().parameters()} == {torch.bfloat16}


def test_another_architecture_is_refused():
    other = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"from_hf reads llama, mistral.*'gpt2'"):
        SLMForCausalLM.from_hf(other)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pattern": "attn/mlp@shared*2"}, "block 0 of pattern"),
        ({"pattern": "attn/mlp swa/mlp", "sliding_window": 4}, "block 1 of pattern"),
        ({"pattern": "attn/mlp*2", "repeat": 2}, "repeat=2"),
    ],
)
def test_what_llama_cannot_hold_is_not_exported_as_one(values, message):
    model = SLMForCausalLM(SLMConfig(vocab_size=V, hidden_size=32, intermediate_size=48, **values))
    with pytest.raises(ValueError, match=message):
        model.to_hf()


def test_changed_layers_are_not_exported_silently():
    model = SLMForCausalLM.from_hf(hf_model("llama", "heads grouped, tied"))
    model.model.layers[1].token_mixer.o_proj = torch.nn.Linear(32, 32, bias=True)
    with pytest.raises(ValueError, match=r"layers\.1\.token_mixer\.o_proj\.bias.*no place in a Llama"):
        model.to_hf()
