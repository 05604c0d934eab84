"""The tiny story teller of llama2.c: read, checked against its own arithmetic, and listened to."""

# Shape letters: T = tokens, D = model width, H = heads, K = key-value heads, d = head width.

import gzip
import math
import struct
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from lightning_slm.models.decode import generate_stream
from lightning_slm.models.llama2c import load_llama2c, load_llama2c_tokenizer


@pytest.fixture
def folder(shared_data):
    return shared_data / "weights" / "stories260K"


def naive_forward(data, ids):
    """llama2.c's run.c, written again: its file order, and rotation of neighbouring pairs."""
    D, inner, L, H, K, V, _ = struct.unpack_from("<7i", data)
    numbers, start, d = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32), 0, D // H

    def take(*shape):
        nonlocal start
        start += math.prod(shape)
        return numbers[start - math.prod(shape) : start].view(shape)

    embedding, norm1 = take(V, D), take(L, D)
    wq, wk, wv, wo = take(L, D, D), take(L, K * d, D), take(L, K * d, D), take(L, D, D)
    norm2, w1, w2, w3, norm = take(L, D), take(L, inner, D), take(L, D, inner), take(L, inner, D), take(D)

    def rotated(x_THd):
        angle = torch.arange(len(ids))[:, None] * 10000.0 ** -(torch.arange(0, d, 2) / d)
        pairs = torch.view_as_complex(x_THd.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)

    x_TD = embedding[ids]
    for i in range(L):
        h = F.rms_norm(x_TD, (D,), norm1[i], 1e-5)
        q, k = rotated((h @ wq[i].T).view(-1, H, d)), rotated((h @ wk[i].T).view(-1, K, d))
        k, v = (t.repeat_interleave(H // K, 1) for t in (k, (h @ wv[i].T).view(-1, K, d)))
        scores = torch.einsum("thd,shd->hts", q, k) / d**0.5
        scores = scores.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -torch.inf)
        x_TD = x_TD + torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1) @ wo[i].T
        h = F.rms_norm(x_TD, (D,), norm2[i], 1e-5)
        x_TD = x_TD + (F.silu(h @ w1[i].T) * (h @ w3[i].T)) @ w2[i].T
    return F.rms_norm(x_TD, (D,), norm, 1e-5) @ embedding.T


def naive_encode(data, text):
    """llama2.c's encoder: characters, then again and again the merge of the best score."""
    pieces, scores, position = {}, [], 4
    while position < len(data):
        score, length = struct.unpack_from("<fi", data, position)
        position += 8 + length
        pieces.setdefault(data[position - length : position].decode(), len(scores))
        scores.append(score)
    ids = []
    for character in " " + text:
        ids += [pieces[character]] if character in pieces else [byte + 3 for byte in character.encode()]
    names = {i: piece for piece, i in pieces.items()}
    while True:
        merged = [(pieces.get(names.get(a, "") + names.get(b, "")), i) for i, (a, b) in enumerate(pairwise(ids))]
        best = max(((scores[new], -i, new) for new, i in merged if new is not None), default=None)
        if best is None:
            return [1, *ids]
        ids[-best[1] : -best[1] + 2] = [best[2]]


def test_the_tokenizer_is_that_of_llama2c_and_loses_nothing(folder, shared_data):
    tokenizer, data = load_llama2c_tokenizer(folder / "tok512.bin"), (folder / "tok512.bin").read_bytes()
    assert len(tokenizer) == 512
    text = gzip.decompress((shared_data / "tinystories" / "valid.txt.gz").read_bytes()).decode()
    for part in (text[:600], text[5000:5600], "Zoë's  café: 42 %\n\tend", "a"):
        assert tokenizer.encode(part) == naive_encode(data, part)
        assert tokenizer.decode(tokenizer.encode(part), skip_special_tokens=True) == part


def test_the_logits_are_those_of_llama2cs_arithmetic(folder):
    model, ids = load_llama2c(folder / "stories260K.bin"), torch.randint(3, 512, (40,))
    with torch.no_grad():
        ours = model(ids[None]).logits[0]
    torch.testing.assert_close(
        ours, naive_forward((folder / "stories260K.bin").read_bytes(), ids), rtol=1e-4, atol=1e-4
    )


def test_it_tells_a_story(folder):
    model, tokenizer = load_llama2c(folder / "stories260K.bin"), load_llama2c_tokenizer(folder / "tok512.bin")
    tokens = list(generate_stream(model, tokenizer.encode("Once upon a time"), 40, eos_token_id=2))
    assert tokenizer.decode(tokens).startswith(", there was a little girl named Lily. She loved to play outside")


def test_its_perplexity_on_unseen_stories_is_that_of_a_trained_model(folder, shared_data):
    model, tokenizer = load_llama2c(folder / "stories260K.bin"), load_llama2c_tokenizer(folder / "tok512.bin")
    text = gzip.decompress((shared_data / "tinystories" / "valid.txt.gz").read_bytes()).decode()
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for story in stories[:30]:
            ids = torch.tensor(tokenizer.encode(story)[:512])[None]
            nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    assert 3.1 < math.exp(nats / tokens) < 3.4  # guessing among 512 pieces would be 512


def test_a_file_that_is_none_is_refused(tmp_path, folder):
    data = (folder / "stories260K.bin").read_bytes()
    for name, content, message in (
        ("short", b"abc", "hold no header"),
        ("other", b"not a checkpoint, but long enough for one", "makes no sense"),
        ("cut", data[: len(data) // 2 + 1], "its header asks for 1056540; is it whole"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_llama2c(tmp_path / name)
