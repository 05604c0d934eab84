"""RWKV-4 in ``transformers`` is one oracle: the same weights give the same logits, gradients and text. The other are
the logits that rwkv.cpp's own tests expect of a tiny RWKV-7.
"""

# Shape letters: B = batch, T = tokens.

import struct
from pathlib import Path

import pytest
import torch
from transformers import RwkvConfig, RwkvForCausalLM

from lightning_slm.models import SLMForCausalLM
from lightning_slm.models.convert.rwkv import from_rwkv_cpp, rwkv_names
from lightning_slm.models.decode import generate_stream

V = 61
FOLDER = Path(__file__).parents[2].parent / "shared/data/weights/tiny_rwkv"
needs_weights = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs ../shared/data/weights/tiny_rwkv")


@pytest.fixture(params=[{}, {"tie_word_embeddings": True}, {"rescale_every": 0}], ids=["plain", "tied", "not rescaled"])
def theirs(request):
    values = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 5, "rescale_every": 2, "intermediate_size": 48}
    model = RwkvForCausalLM(RwkvConfig(**{**values, **request.param})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():  # all of them matter, and time_first is not all ones
            if "time" in name:
                p.copy_(torch.rand_like(p) if "mix" in name else torch.randn_like(p))
            else:
                p.add_(0.2 * torch.randn_like(p))
    return model


def tokens():
    return torch.randint(1, V, (2, 19))


def test_logits_are_theirs_before_and_after_they_have_rescaled_their_weights(theirs):
    ids_BT = tokens()
    early = SLMForCausalLM.from_hf(theirs)
    expected = theirs(ids_BT, use_cache=False).logits
    assert theirs.rwkv.layers_are_rescaled
    for ours in (early, SLMForCausalLM.from_hf(theirs)):
        torch.testing.assert_close(ours(ids_BT).logits, expected, rtol=1e-4, atol=1e-4)


def test_loss_and_gradients_are_theirs(theirs):
    ids_BT = tokens()
    theirs.train()
    ours = SLMForCausalLM.from_hf(theirs)
    assert ours.training
    our_loss, their_loss = (model(input_ids=ids_BT, labels=ids_BT).loss for model in (ours, theirs))
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=1e-5)
    our_loss.backward()
    their_loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        (expected,) = (gradients[part] for part in rwkv_names(name, ours.config))
        torch.testing.assert_close(p.grad, expected.view(p.shape), rtol=1e-3, atol=1e-5)


def test_greedy_text_is_theirs(theirs):
    # With a cache, theirs of transformers 5.23 mixes up the rows of a batch (a state (B, D) meets tokens (B, 1, D)).
    ids_BT = tokens()
    ours = SLMForCausalLM.from_hf(theirs)
    how = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = torch.cat([theirs.generate(row_1T, **how) for row_1T in ids_BT.split(1)])
    assert torch.equal(ours.generate(ids_BT, **how), expected)
    assert torch.equal(theirs.generate(ids_BT, use_cache=False, **how), expected)
    assert list(generate_stream(ours, ids_BT[:1], 20)) == expected[0, 19:].tolist()


def test_a_folder_of_theirs_loads(theirs, tmp_path):
    ids_BT = tokens()
    expected = theirs(ids_BT, use_cache=False).logits
    SLMForCausalLM.from_hf(theirs).save_pretrained(tmp_path / "ours")
    theirs.train()(ids_BT)  # puts the weights back, which are saved as they are
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        ours = SLMForCausalLM.from_hf(tmp_path / name).eval()
        torch.testing.assert_close(ours(ids_BT).logits, expected, rtol=1e-4, atol=1e-4)


def test_norms_that_differ_from_the_last_one_are_refused():
    config = RwkvConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, layer_norm_epsilon=1e-6)
    with pytest.raises(ValueError, match="layer_norm_epsilon=1e-06"):
        SLMForCausalLM.from_hf(RwkvForCausalLM(config))


@needs_weights
def test_a_tiny_rwkv_7_gives_the_logits_that_rwkv_cpp_expects_within_1e_5():
    expected_V = torch.frombuffer(
        bytearray((FOLDER / "expected-logits-7v0-834K.bin").read_bytes()), dtype=torch.float32
    )
    model = from_rwkv_cpp(FOLDER / "tiny-rwkv-7v0-834K-FP32.bin")
    ids_1T = torch.tensor([list(b'"in')])
    torch.testing.assert_close(model(ids_1T).logits[0, -1], expected_V, rtol=1e-5, atol=1e-5)


@needs_weights
def test_the_tiny_rwkv_7_reads_token_by_token_what_it_reads_at_once():
    model = from_rwkv_cpp(FOLDER / "tiny-rwkv-7v0-834K-FP32.bin")
    text = (
        b"It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness."
    )
    ids_1T = torch.tensor([list(text)])
    expected = model.generate(ids_1T, max_new_tokens=20, do_sample=False, pad_token_id=0, use_cache=False)
    assert list(generate_stream(model, ids_1T, 20)) == expected[0, len(text) :].tolist()


@needs_weights
def test_another_version_of_rwkv_is_refused():
    with pytest.raises(ValueError, match="another RWKV than version 7"):
        from_rwkv_cpp(FOLDER / "tiny-rwkv-5v2-730K-FP32.bin")


@pytest.mark.parametrize(
    "data",
    [b"", b"no such file at all, none", struct.pack("<6i", 0x67676D66, 101, 256, 64, 12, 5),
     struct.pack("<6i", 0x67676D66, 101, 256, 64, 12, 0) + struct.pack("<5i", 2, 3, 0, 4, 4) + b"emb\0\0\0\0"],
    ids=["empty", "text", "quantised", "cut short"],
)  # fmt: skip
def test_what_is_no_such_file_is_refused(data, tmp_path):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=r"file' is no file of rwkv\.cpp"):
        from_rwkv_cpp(tmp_path / "file")
