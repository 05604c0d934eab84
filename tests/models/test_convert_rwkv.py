"""What only RWKV does: Hugging Face's RWKV-4 rescales its weights (what all architectures do: test_convert_from_hf.py),
and RWKV-7 comes from rwkv.cpp, whose own tests tell the logits that a tiny one must give.
"""

# Shape letters: B = batch, T = tokens.

import struct
from pathlib import Path

import pytest
import torch
from hf_models import KINDS, hf_model
from mixers import tokens

from lightning_slm.models import SLMForCausalLM
from lightning_slm.models.convert.rwkv import from_rwkv_cpp
from lightning_slm.models.decode import generate_stream

FOLDER = Path(__file__).parents[2].parent / "shared/data/weights/tiny_rwkv"
needs_weights = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs ../shared/data/weights/tiny_rwkv")


@pytest.fixture(params=KINDS["rwkv"].shapes)
def theirs(request):
    return hf_model("rwkv", request.param)


def test_logits_are_theirs_before_and_after_they_have_rescaled_their_weights(theirs):
    ids_BT = tokens(2, 19)
    early = SLMForCausalLM.from_hf(theirs)
    expected = theirs(ids_BT, use_cache=False).logits
    assert theirs.rwkv.layers_are_rescaled
    for ours in (early, SLMForCausalLM.from_hf(theirs)):
        torch.testing.assert_close(ours(ids_BT).logits, expected, rtol=1e-4, atol=1e-4)


def test_greedy_text_is_what_theirs_writes_with_a_cache(theirs):
    # Row by row: theirs of transformers 5.23 mixes up those of a batch (a state (B, D) meets tokens (B, 1, D)).
    ids_BT = tokens(2, 19)
    ours = SLMForCausalLM.from_hf(theirs)
    how = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = torch.cat([theirs.generate(row_1T, **how) for row_1T in ids_BT.split(1)])
    assert torch.equal(ours.generate(ids_BT, **how), expected)
    assert torch.equal(theirs.generate(ids_BT, use_cache=False, **how), expected)


def test_folders_load_that_were_saved_after_theirs_has_rescaled_its_weights(theirs, tmp_path):
    ids_BT = tokens(2, 19)
    expected = theirs(ids_BT, use_cache=False).logits
    SLMForCausalLM.from_hf(theirs).save_pretrained(tmp_path / "ours")
    theirs.train()(ids_BT)  # puts the weights back, which are saved as they are
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        ours = SLMForCausalLM.from_hf(tmp_path / name).eval()
        torch.testing.assert_close(ours(ids_BT).logits, expected, rtol=1e-4, atol=1e-4)


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
