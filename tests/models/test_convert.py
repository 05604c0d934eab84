"""Llama in ``transformers`` is the oracle: the same weights give the same logits, gradients and text."""

# Shape letters: B = batch, T = tokens.

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from lightning_slm.models import SLMConfig, SLMForCausalLM

V = 61
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPES = {
    "heads alone, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "heads grouped, tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "heads grouped, untied": {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "wide heads": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
}


def llama(shape):
    values = {**SIZES, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**values, **SHAPES[shape])).eval()


def tokens():
    return torch.randint(1, V, (2, 13))


@pytest.fixture(params=SHAPES)
def theirs(request):
    return llama(request.param)


def test_logits_are_llamas_within_1e_5(theirs):
    ids_BT = tokens()
    ours = SLMForCausalLM.from_hf(theirs)
    torch.testing.assert_close(ours(ids_BT).logits, theirs(ids_BT).logits, rtol=0, atol=1e-5)


def test_loss_and_gradients_are_llamas(theirs):
    ids_BT = tokens()
    ours = SLMForCausalLM.from_hf(theirs)
    our_loss, their_loss = ours(ids_BT, labels=ids_BT).loss, theirs(ids_BT, labels=ids_BT).loss
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-6, atol=1e-6)
    our_loss.backward()
    their_loss.backward()
    # The gradients travel through the same splitting as the weights.
    for p in ours.parameters():
        p.data = p.grad
    back = ours.to_hf().state_dict()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(back[name], p.grad, rtol=1e-4, atol=1e-6)


def test_greedy_text_and_beams_are_llamas(theirs):
    ids_BT = tokens()
    ours = SLMForCausalLM.from_hf(theirs)
    for how in ({}, {"num_beams": 3}):
        assert torch.equal(
            ours.generate(ids_BT, max_new_tokens=20, do_sample=False, **how),
            theirs.generate(ids_BT, max_new_tokens=20, do_sample=False, **how),
        )


def test_there_and_back_is_bit_identical(theirs):
    back = SLMForCausalLM.from_hf(theirs).to_hf()
    assert type(back) is LlamaForCausalLM
    assert list(back.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), theirs.state_dict().values()))
    ours, original = back.config.to_dict(), theirs.config.to_dict()
    assert {k: ours[k] for k in original if k != "architectures"} == {
        k: v for k, v in original.items() if k != "architectures"
    }


def test_a_folder_of_a_llama_loads_and_a_folder_of_ours_too(tmp_path):
    theirs, ids_BT = llama("heads grouped, tied"), tokens()
    theirs.save_pretrained(tmp_path / "llama")
    ours = SLMForCausalLM.from_hf(tmp_path / "llama").eval()
    torch.testing.assert_close(ours(ids_BT).logits, theirs(ids_BT).logits, rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    assert torch.equal(SLMForCausalLM.from_hf(tmp_path / "ours").eval()(ids_BT).logits, ours(ids_BT).logits)
    ours.to_hf().save_pretrained(tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(back) is LlamaForCausalLM
    assert torch.equal(back(ids_BT).logits, theirs(ids_BT).logits)


@pytest.mark.parametrize("window", [None, 4])
def test_a_mistral_becomes_a_stack_of_windows(window):
    values = {**SIZES, "num_key_value_heads": 2, "initializer_range": 0.3, "sliding_window": window, "pad_token_id": 0}
    theirs, ids_BT = MistralForCausalLM(MistralConfig(**values)).eval(), tokens()
    ours = SLMForCausalLM.from_hf(theirs)
    assert ours.config.pattern == ("swa/mlp*3" if window else "attn/mlp*3")
    torch.testing.assert_close(ours(ids_BT).logits, theirs(ids_BT).logits, rtol=1e-5, atol=1e-5)


def test_the_precision_of_the_weights_is_kept():
    ours = SLMForCausalLM.from_hf(llama("heads grouped, untied").to(torch.bfloat16))
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in ours.to_hf().parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention_bias": True}, "attention_bias.*True"),
        ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type.*linear"),
    ],
)
def test_a_variant_that_ours_lacks_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SLMForCausalLM.from_hf(LlamaForCausalLM(LlamaConfig(**SIZES, **values)))


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
    model = SLMForCausalLM.from_hf(llama("heads grouped, tied"))
    model.model.layers[1].token_mixer.o_proj = torch.nn.Linear(32, 32, bias=True)
    with pytest.raises(ValueError, match=r"layers\.1\.token_mixer\.o_proj\.bias.*no place in a Llama"):
        model.to_hf()
