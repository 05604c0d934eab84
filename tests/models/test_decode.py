"""The static-state loop writes what ``generate()`` writes."""

import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_slm.models import SLMConfig, SLMForCausalLM, decode
from lightning_slm.models.decode import generate_stream, make_decoder, sample

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # inductor's import

V = 61
PATTERNS = {
    "attention": {"pattern": "attn/mlp*2"},
    "window": {"pattern": "swa/mlp attn/mlp", "sliding_window": 4},
    "repeated": {"pattern": "attn/mlp@shared*2", "repeat": 2},
}


def build(name="attention"):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return SLMForCausalLM(
        SLMConfig(vocab_size=V, max_position_embeddings=64, initializer_range=0.3, **sizes, **PATTERNS[name])
    ).eval()


def greedy(model, ids, count):
    return model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("prompt", [1, 7])
@pytest.mark.parametrize("name", PATTERNS)
def test_greedy_text_is_that_of_generate(name, prompt):
    model, ids_1T = build(name), torch.randint(1, V, (1, prompt))
    assert list(generate_stream(model, ids_1T, 20)) == greedy(model, ids_1T, 20)
    assert list(generate_stream(model, ids_1T[0].tolist(), 20)) == greedy(model, ids_1T, 20)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler for torch.compile")
def test_greedy_text_is_the_same_when_compiled():
    model, ids_1T = build("window"), torch.randint(1, V, (1, 7))
    assert list(generate_stream(model, ids_1T, 20, compile=True)) == greedy(model, ids_1T, 20)


def test_models_of_hugging_face_decode_through_their_own_cache():
    sizes = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3, eos_token_id=None)).eval()
    ids_1T = torch.randint(1, V, (1, 7))
    assert list(generate_stream(model, ids_1T, 20)) == greedy(model, ids_1T, 20)
    with pytest.raises(ValueError, match="compile=True needs an SLMForCausalLM"):
        next(generate_stream(model, ids_1T, 20, compile=True))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_logits_of_every_step_are_those_of_the_whole_sequence(name, compile, monkeypatch):
    # The compiled step traced and run, without the minute of code generation.
    traced = torch.compile(decode._static_step, backend="aot_eager", dynamic=False, fullgraph=True)
    monkeypatch.setattr(decode, "_compiled_step", lambda: traced)
    model, ids_BT = build(name), torch.randint(1, V, (3, 16))
    read = make_decoder(model, 3, 16, compile=compile)
    with torch.no_grad():
        logits = [read(ids_BT[:, :5])] + [read(ids_BT[:, t : t + 1]) for t in range(5, 16)]
        whole = model(ids_BT).logits[:, 4:]
    torch.testing.assert_close(torch.stack(logits, 1), whole, rtol=1e-4, atol=1e-4)


def test_the_end_of_text_ends_it_and_is_yielded():
    model, ids_1T = build(), torch.randint(1, V, (1, 7))
    tokens = list(generate_stream(model, ids_1T, 20))
    end = tokens[4]
    assert list(generate_stream(model, ids_1T, 20, eos_token_id=end)) == tokens[: tokens.index(end) + 1]


def test_the_model_comes_back_in_the_mode_it_was_in():
    model = build().train()
    list(generate_stream(model, [1, 2], 3))
    assert model.training
    stream = generate_stream(model, [1, 2], 3)
    next(stream)
    stream.close()
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_an_empty_prompt_and_too_long_a_text_are_refused():
    model = build()
    with pytest.raises(ValueError, match="input_ids is empty"):
        next(generate_stream(model, [], 3))
    for compile in (False, True):
        with pytest.raises(ValueError, match="65 tokens of prompt and continuation are more than"):
            next(generate_stream(model, [1] * 5, 60, compile=compile))
    assert len(list(generate_stream(model, [1] * 5, 59))) == 59


def test_sampling_follows_the_probabilities():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probs.log().expand(20_000, -1)

    def frequencies(**how):
        return torch.bincount(sample(logits, **how)[:, 0], minlength=4) / len(logits)

    # 20,000 draws: three standard deviations are at most 0.011.
    torch.testing.assert_close(frequencies(temperature=1.0), probs, rtol=0, atol=0.011)
    sharp = probs.square() / probs.square().sum()
    torch.testing.assert_close(frequencies(temperature=0.5), sharp, rtol=0, atol=0.011)
    torch.testing.assert_close(frequencies(temperature=1.0, top_k=2)[:2], probs[:2] / 0.8, rtol=0, atol=0.011)
    assert frequencies(temperature=1.0, top_k=2)[2:].sum() == 0
    assert frequencies(temperature=1.0, top_p=0.7)[2:].sum() == 0
    assert frequencies(temperature=1.0, top_p=0.85)[2] > 0
    assert frequencies(temperature=0.0)[0] == 1
