"""MaskedLM: which tokens are masked, the loss of any model on them, and runs that go on where they stopped."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from support import GivenBatches, differences, kill_and_resume, learned, trainer
from torch import nn
from transformers import AutoModelForMaskedLM

from lightning_slm.data import TextData
from lightning_slm.data.tokenizer import train_tokenizer, with_mask_token
from lightning_slm.models import SLMConfig, load_model
from lightning_slm.modules import CausalLM, MaskedLM, SequenceClassifier
from lightning_slm.modules.masking import MaskedLogits, draws_of_rows, draws_of_step, mask_tokens

# Shape letters: B = batch, T = tokens, V = vocabulary.
V, T, MASK = 48, 12, 1
SLM = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_attention_heads=2, pattern="attn/mlp*2", causal=False,
    max_position_embeddings=32,
)  # fmt: skip
SIZES = dict(vocab_size=V, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32)
HF = {
    "BERT": dict(model_type="bert", hidden_size=32, intermediate_size=48, **SIZES),
    "DistilBERT": dict(model_type="distilbert", vocab_size=V, dim=32, hidden_dim=48, n_layers=2, n_heads=2),
    "MobileBERT": dict(
        model_type="mobilebert", hidden_size=32, embedding_size=16, intermediate_size=48, intra_bottleneck_size=16,
        true_hidden_size=16, **SIZES,
    ),
    "TinyBERT, heads of 13": dict(model_type="bert", hidden_size=26, intermediate_size=48, **SIZES),
    "Nystromformer": dict(model_type="nystromformer", hidden_size=32, intermediate_size=48, **SIZES),
}  # fmt: skip


class Own(nn.Module):
    """A module of the user's."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(V, 16), nn.Linear(16, V)

    def forward(self, ids):
        return {"logits": self.out(torch.tanh(self.embed(ids)))}


class WholeSequence(nn.Module):
    """A head that mixes positions: it must see them all."""

    def forward(self, x):
        return x + x.mean(1, keepdim=True)


MODELS = {"ours": SLM, **HF}


def make_batch(seed=0, rows=4, length=T):
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(2, V, (rows, length), generator=generator)}


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1)


def module(model=SLM, **arguments):
    made = MaskedLM(model, **{"mask_token_id": MASK, "optimizer": sgd, "lr_scheduler": None, **arguments})
    made.configure_model()
    return made


def masked_ids(made, batch, epoch_and_batch=(0, 0)):
    return made._masked(batch, draws_of_step(batch["input_ids"].shape, 0, *epoch_and_batch, 0))


# Which tokens


def test_a_seventh_is_masked_and_of_those_eight_tenths_become_the_mask_one_a_random_token():
    ids_BT = torch.randint(10, 1000, (64, 512))
    read, labels = mask_tokens(
        ids_BT, torch.ones_like(ids_BT).bool(), draws_of_step(ids_BT.shape, 0), MASK, torch.arange(10, 1000), 0.15
    )
    chosen = labels != -100
    share = chosen.float().mean().item()
    assert share == pytest.approx(0.15, abs=0.005)  # five standard deviations are 0.01
    assert torch.equal(labels[chosen], ids_BT[chosen])
    assert torch.equal(read[~chosen], ids_BT[~chosen])
    parts = [(read == MASK), (read == ids_BT), (read != MASK) & (read != ids_BT)]
    shares = [(part & chosen).sum().item() / chosen.sum().item() for part in parts]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    random = read[parts[2] & chosen]
    assert len(random.unique()) > 300
    assert random.min() >= 10


def test_special_tokens_padding_and_what_has_no_label_are_never_masked_nor_drawn():
    made = module({**SLM, "pad_token_id": 0, "eos_token_id": 5})
    batch = make_batch(rows=200)
    batch["input_ids"][:, 4] = 5
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][:, 9:] = 0
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, 0] = -100
    read, labels = masked_ids(made, batch)
    chosen = labels != -100
    assert not chosen[:, [0, 4, 9, 10, 11]].any()
    assert chosen[:, [1, 2, 3, 5, 6, 7, 8]].float().mean().item() == pytest.approx(0.15, abs=0.05)
    assert not ((read == 0) | (read == 5))[chosen].any()


def test_masks_are_new_in_every_step_and_the_same_when_the_step_is_done_again():
    made, batch = module(), make_batch(rows=50)
    first, again, next_step, next_epoch = (
        masked_ids(made, batch, place)[0] for place in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, next_step)
    assert not torch.equal(first, next_epoch)
    assert not torch.equal(draws_of_step((2, 3), 0, 0, 0, 0), draws_of_step((2, 3), 0, 0, 0, 1))  # another rank


def test_in_evaluation_a_row_decides_its_mask_whatever_batch_and_padding_it_comes_in():
    ids_BT = make_batch()["input_ids"]
    alone = draws_of_rows(ids_BT[2:3], None, 0)
    padded = torch.cat((ids_BT, torch.zeros(4, 3, dtype=torch.long)), 1)
    with_others = draws_of_rows(padded, padded != 0, 0)
    assert torch.equal(alone[:, 0], with_others[:, 2, :T])
    assert not torch.equal(with_others[:, 1], with_others[:, 2])
    assert not torch.equal(alone, draws_of_rows(ids_BT[2:3], None, 1))


def test_the_validation_does_not_depend_on_the_batch_size(tmp_path):
    made, batch = module(), make_batch(rows=24)
    results = []
    for size in (24, 5):
        rows = [{"input_ids": part} for part in batch["input_ids"].split(size)]
        (logged,) = trainer(tmp_path).validate(made, GivenBatches(rows), verbose=False)
        results.append(logged)
    assert results[0] == pytest.approx(results[1], abs=1e-5)
    assert results[0]["val_perplexity"] == pytest.approx(math.exp(results[0]["val_loss"]), rel=1e-5)


# Any model, and Hugging Face as the oracle


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_hugging_face_for_the_same_masked_batch(kind, tmp_path):
    made = module(MODELS[kind])
    made.eval()
    assert made._loss.selects
    read, labels = masked_ids(made, make_batch(rows=8))
    batch = {"input_ids": read, "labels": labels, "attention_mask": torch.ones_like(read)}
    batch["attention_mask"][0, 9:] = 0
    expected = made.model(**batch).loss  # over every position's logits
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}
    made.zero_grad()
    given = module(made.model, mask_probability=0.0).eval()
    nats, _, labels_n, _ = given._guess(batch, torch.zeros(3, 8, T))
    loss = nats / len(labels_n)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    assert gradients
    for name, p in made.model.named_parameters():
        torch.testing.assert_close(p.grad, gradients.get(name), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", [*MODELS, "own"])
def test_every_kind_of_model_trains(kind, tmp_path):
    made = module(Own() if kind == "own" else MODELS[kind], optimizer=lambda g: torch.optim.Adam(g, lr=1e-2))
    run = trainer(tmp_path, steps=30)
    batch = {"input_ids": torch.arange(2, 2 + T).repeat(8, 1)}  # position tells token
    (before,) = run.validate(made, GivenBatches([batch]), verbose=False)
    run.fit(made, GivenBatches([batch]))
    assert run.callback_metrics["val_loss"] < 0.95 * before["val_loss"]
    assert 0 <= run.callback_metrics["val_accuracy"] <= 1
    assert run.callback_metrics["train_loss"] < before["val_loss"]


def test_a_head_that_needs_the_whole_sequence_is_given_it():
    model = load_model(SLM, "masked").eval()
    plain = MaskedLogits(model)
    assert plain.selects
    model.head_norm = nn.Sequential(model.head_norm, WholeSequence())
    whole = MaskedLogits(model)
    assert not whole.selects
    ids, wanted = make_batch()["input_ids"], torch.rand(4, T) < 0.3
    assert torch.equal(whole({"input_ids": ids}, ids, wanted)[0], model(ids).logits[wanted])


@pytest.mark.parametrize("kind", MODELS)
def test_a_step_without_any_mask_changes_nothing_and_does_not_fail(kind, tmp_path):
    made = module(MODELS[kind])
    before = {n: p.clone() for n, p in made.named_parameters()}
    empty = {"input_ids": torch.full((2, T), 7), "attention_mask": torch.zeros(2, T).long()}
    empty["attention_mask"][:, 0] = 1
    empty["labels"] = torch.full((2, T), -100)
    trainer(tmp_path, steps=1).fit(made, GivenBatches([empty]))
    assert not differences(before, {n: p.detach() for n, p in made.named_parameters()})


def test_micro_batches_with_different_numbers_of_masks_train_as_one_large_batch(tmp_path):
    """Of batches that are masked already, so that the masks are the same."""
    start = load_model(SLM, "masked").state_dict()
    micro = []
    for seed, keep in enumerate([0.5, 0.05, 0.3, 0.1]):
        ids = make_batch(seed)["input_ids"]
        labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) > keep, -100)
        micro.append({"input_ids": ids.masked_fill(labels != -100, MASK), "labels": labels})
    large = [{key: torch.cat([b[key] for b in micro]) for key in micro[0]}]
    ends = []
    for batches, accumulate in ((large, 1), (micro, 4)):
        made = module(mask_probability=0.0)
        made.model.load_state_dict(start)
        run = trainer(tmp_path, steps=1, accumulate_grad_batches=accumulate)
        run.fit(made, GivenBatches(batches))
        ends.append((made, run.callback_metrics["train_loss"]))
    torch.testing.assert_close(ends[0][1], ends[1][1], atol=1e-6, rtol=0)
    for a, b in zip(ends[0][0].parameters(), ends[1][0].parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_prediction_fills_the_masks_in_and_leaves_the_rest(tmp_path):
    made = module()
    ids = make_batch()["input_ids"]
    ids[:, 3], ids[1, 7] = MASK, MASK
    (filled,) = trainer(tmp_path).predict(made, GivenBatches([{"input_ids": ids}]))
    expected = made.model.eval()(ids).logits.argmax(-1)
    assert torch.equal(filled, torch.where(ids == MASK, expected, ids))


@pytest.mark.parametrize(
    ("batch", "message"),
    [(torch.zeros(2, 3), "batch is a Tensor"), ({"tokens": torch.zeros(2, 3)}, r"batch has \['tokens'\]")],
    ids=["tensor", "other keys"],
)
def test_a_batch_of_another_kind_is_refused(batch, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        module()._evaluate("val", batch, 0)


# Runs


class NaN(Callback):
    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == 2:
            with torch.no_grad():
                pl_module.model.lm_head.bias.fill_(float("nan"))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="loss is nan at step 2"):
        trainer(tmp_path, [NaN()]).fit(module(), GivenBatches([make_batch()]))


def test_a_killed_run_goes_on_with_the_very_masks_it_would_have_seen(tmp_path):
    straight, resumed = kill_and_resume(
        lambda: MaskedLM(SLM, mask_token_id=MASK),
        list,
        tmp_path,
        loader=lambda: GivenBatches([make_batch(i) for i in range(32)]).train_dataloader(),
        accumulate_grad_batches=2,
    )
    assert not differences(learned(straight), learned(resumed))


def test_it_trains_on_text_data_that_has_a_mask_token_and_comes_back_from_its_checkpoint(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"def f{i}(value): return value + {i}" * 30 for i in range(90)))
    how = dict(vocab_size=300, window=16, batch_size=4, val_fraction=0.2, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"tokenizer has no mask token; give TextData\(mask_token=True\)"):
        trainer(tmp_path).fit(MaskedLM({**SLM, "vocab_size": 300}), TextData(tmp_path / "text.txt", **how))
    data = TextData(tmp_path / "text.txt", mask_token=True, document_mask=True, **how)
    made = MaskedLM({**SLM, "vocab_size": 300})
    run = trainer(tmp_path, steps=4)
    run.fit(made, data)
    assert data.tokenizer.mask_token == "<mask>"
    assert data.vocab_size == len(data.tokenizer) == 300
    run.save_checkpoint(tmp_path / "end.ckpt")
    again = MaskedLM.load_from_checkpoint(tmp_path / "end.ckpt").eval()
    assert again.tokenizer.mask_token_id == data.tokenizer.mask_token_id == again._mask_id()
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(again.model(batch["input_ids"]).logits, made.eval().model(batch["input_ids"]).logits)
    made.save_pretrained(tmp_path / "folder")
    folder = AutoModelForMaskedLM.from_pretrained(tmp_path / "folder").eval()
    assert torch.equal(folder(batch["input_ids"]).logits, made.model(batch["input_ids"]).logits)
    assert MaskedLM.from_checkpoint(tmp_path / "folder").tokenizer.mask_token == "<mask>"


def test_a_checkpoint_of_another_task_is_refused(tmp_path):
    made = module(HF["BERT"])
    run = trainer(tmp_path, steps=1)
    run.fit(made, GivenBatches([make_batch()]))
    run.save_checkpoint(tmp_path / "end.ckpt")
    for other in (CausalLM, SequenceClassifier):
        with pytest.raises(ValueError, match=r"model for the task 'masked'.*init_weights_from"):
            other.load_from_checkpoint(tmp_path / "end.ckpt")


def test_weights_of_another_tokenizers_ids_are_refused(tmp_path):
    texts = [f"value {i} and more" for i in range(200)]
    tokenizer = with_mask_token(train_tokenizer(texts, 270))
    made = MaskedLM({**SLM, "vocab_size": 300})
    run = trainer(tmp_path, steps=1)
    run.fit(made, GivenBatches([make_batch()], tokenizer=tokenizer))
    run.save_checkpoint(tmp_path / "end.ckpt")
    made.save_pretrained(tmp_path / "folder")
    other = with_mask_token(train_tokenizer([text.upper() for text in texts], 270))
    for source in ("end.ckpt", "folder"):
        second = MaskedLM({**SLM, "vocab_size": 300}, init_weights_from=tmp_path / source)
        with pytest.raises(ValueError, match=r"another tokenizer than the data.*give the data tokenizer="):
            trainer(tmp_path, steps=1).fit(second, GivenBatches([make_batch()], tokenizer=other))
        same = MaskedLM({**SLM, "vocab_size": 300}, init_weights_from=tmp_path / source, optimizer=sgd)
        trainer(tmp_path, steps=1).fit(same, GivenBatches([make_batch()], tokenizer=tokenizer))


def test_a_probability_that_masks_everything_is_refused():
    with pytest.raises(ValueError, match=r"mask_probability=1.0 must be .* below 1"):
        MaskedLM(SLM, mask_probability=1.0)


def test_a_configuration_object_is_taken_too():
    assert module(SLMConfig(**SLM)).model.config.hidden_size == 32


def test_callbacks_that_look_at_the_next_token_refuse_or_leave_it_out(tmp_path):
    from lightning_slm.callbacks import CompressionReport, KnowledgeDistillation

    data = GivenBatches([make_batch()])
    with pytest.raises(ValueError, match="MaskedLM trains for the task 'masked', but KnowledgeDistillation"):
        trainer(tmp_path, [KnowledgeDistillation(load_model(SLM, "masked"))]).fit(module(), data)
    report = CompressionReport(runs=1, new_tokens=2, prompt_tokens=2)
    trainer(tmp_path, [report], steps=1).fit(module(), data)
    rows = json.loads((tmp_path / "report" / "report.json").read_text())["rows"]
    assert rows["perplexity"]["after"] is None
    assert rows["parameters"]["after"] > 0


# Real text


@pytest.mark.slow
def test_on_real_text_the_loss_falls_well_below_that_of_guessing_by_frequency(shared_data, tmp_path):
    """Entropy of the tokens' frequencies: what is had without looking at the neighbours at all."""
    torch.set_num_threads(1)
    data = TextData(
        shared_data / "tinystories" / "train.txt.gz", vocab_size=512, window=64, batch_size=16, mask_token=True,
        cache_dir=tmp_path,
    )  # fmt: skip
    data.prepare_data()
    counts = torch.bincount(torch.from_numpy(data.cache.ids("val").astype("int64"))).float()
    share = counts[counts > 0] / counts.sum()
    unigram = -(share * share.log()).sum().item()
    sizes = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_attention_heads=4)
    made = MaskedLM({**sizes, "pattern": "attn/mlp*2", "causal": False}, mask_probability=0.3)
    run = trainer(tmp_path, steps=400, limit_val_batches=8, val_check_interval=400, check_val_every_n_epoch=None)
    run.fit(made, data)
    loss = run.callback_metrics["val_loss"].item()
    print(f"masked {loss:.3f}, unigram entropy {unigram:.3f}, accuracy {run.callback_metrics['val_accuracy']:.3f}")
    assert loss < unigram - 1.0


def test_the_sum_of_the_loss_is_in_float32_under_autocast():
    made = module()
    with torch.autocast("cpu", torch.bfloat16):
        nats, logits, labels, _ = made._guess(make_batch(rows=8), draws_of_step((8, T), 0))
    assert nats.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(nats, F.cross_entropy(logits, labels, reduction="sum"))
