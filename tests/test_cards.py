"""What the cards and the README say, runs."""

import lightning.pytorch as pl
import pytest
import torch
from cards import CARDS, ROOT, SECTIONS, code_blocks, front_matter, readme_with_table, sections

from lightning_slm import CausalLM, SLMConfig, SLMForCausalLM, TextData

README = ROOT / "README.md"


def tiny_config(vocab_size: int = 512) -> SLMConfig:
    return SLMConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        pattern="attn/mlp*2",
    )


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    """The names a card may use without making them: a tiny module, its network, a teacher, and a little text."""
    monkeypatch.chdir(tmp_path)
    # Small trainers for everyone: the blocks show what a user writes, not how a test keeps itself short.
    quick = {"max_steps": 8, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    original = pl.Trainer.__init__
    monkeypatch.setattr(pl.Trainer, "__init__", lambda self, **kw: original(self, **{**quick, **kw}))
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(60):
        (corpus / f"{i}.py").write_text("\n".join(f"def f{i}_{j}(x):\n    return x + {j}\n" for j in range(40)))
    rows = [f"a {word} film of number {i}\t{word}" for i in range(60) for word in ("good", "bad")]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    data = TextData(path=str(corpus), vocab_size=512, window=32, batch_size=4)
    module = CausalLM(model=SLMForCausalLM(tiny_config()))
    batches = [{"input_ids": (ids := torch.randint(0, 512, (2, 32))), "labels": ids} for _ in range(2)]
    return {
        "data": data,
        "module": module,
        "model": module.model,
        "teacher": SLMForCausalLM(tiny_config()),
        "student": SLMForCausalLM(tiny_config()),
        "bitnet": CausalLM(model=SLMForCausalLM(tiny_config())),
        "batches": batches,
    }


@pytest.mark.parametrize("card", CARDS, ids=lambda c: c.stem)
def test_a_card_has_its_sections_and_front_matter(card):
    assert set(front_matter(card)) >= {"technique", "form", "needs", "status", "paper"}
    missing = [s for s in SECTIONS if not any(h.startswith(s) for h in sections(card))]
    assert missing == []


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS, ids=lambda c: c.stem)
def test_the_code_of_a_card_runs(card, namespace):
    blocks = code_blocks(card.read_text())
    assert blocks, "a card shows how to use its technique"
    for block in blocks:
        assert len(block.splitlines()) <= 10
        exec(compile(block, str(card), "exec"), namespace)


@pytest.mark.slow
def test_the_code_of_the_readme_runs(namespace):
    blocks = code_blocks(README.read_text())
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)


def test_the_readme_table_is_made_from_the_cards():
    text = README.read_text()
    assert text == readme_with_table(text), "run: python tests/cards.py --write"
