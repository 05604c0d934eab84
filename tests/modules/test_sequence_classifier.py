"""SequenceClassifier: any model, names that travel with it, scores as they are defined, and real tasks."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from support import GivenBatches, Killed, SaveAndDie, checkpoint, differences, learned, trainer
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

from lightning_slm.data import ClassificationData
from lightning_slm.data.tokenizer import load_tokenizer
from lightning_slm.models import load_model
from lightning_slm.modules import CausalLM, MaskedLM, MuonAdamW, SequenceClassifier, parameter_groups

# Shape letters: B = batch, T = tokens, V = vocabulary, K = classes.
V, T, K = 48, 12, 3
NAMES = ["bad", "fair", "good"]
SLM = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_attention_heads=2, pattern="attn/mlp*2",
    max_position_embeddings=32,
)  # fmt: skip
ENCODER = {**SLM, "causal": False}
SIZES = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=32,
)  # fmt: skip
BERT = dict(model_type="bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES)
MODELS = {
    "encoder of ours": ENCODER,
    "decoder of ours": SLM,
    "BERT": BERT,
    "DistilBERT": dict(model_type="distilbert", vocab_size=V, dim=32, hidden_dim=48, n_layers=2, n_heads=2),
    "Llama": dict(model_type="llama", pad_token_id=0, **SIZES),
    "GPT-2": dict(model_type="gpt2", vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_positions=32, pad_token_id=0),
}


class Own(nn.Module):
    """A module of the user's."""

    def __init__(self, answers=K):
        super().__init__()
        self.embed, self.out = nn.Embedding(V, 16), nn.Linear(16, answers)

    def forward(self, ids, attention_mask):
        x = self.embed(ids) * attention_mask[..., None]
        return self.out(x.sum(1) / attention_mask.sum(1, keepdim=True))


def make_batch(seed=0, rows=12, classes=K):
    """The label is the first token, modulo the classes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V, (rows, T), generator=generator)
    mask = (torch.arange(T) < torch.randint(3, T + 1, (rows, 1), generator=generator)).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids[:, 0] % classes}


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1)


def module(model=ENCODER, **arguments):
    made = SequenceClassifier(model, **{"num_labels": K, "optimizer": sgd, "lr_scheduler": None, **arguments})
    made.configure_model()
    return made


def assert_same(a, b):
    assert not differences(dict(a.state_dict()), dict(b.state_dict()))


# Any model, and Hugging Face as the oracle


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_hugging_face(kind, tmp_path):
    made, batch = module(MODELS[kind]), make_batch()
    made.eval()
    expected = made.model(**batch).loss
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}
    made.zero_grad()
    summed, logits, _ = made._answer(batch)
    loss = summed / len(logits)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    assert gradients
    for name, p in made.model.named_parameters():
        torch.testing.assert_close(p.grad, gradients.get(name), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", [*MODELS, "own"])
def test_every_kind_of_model_learns(kind, tmp_path):
    made = module(Own() if kind == "own" else MODELS[kind], optimizer=lambda g: torch.optim.Adam(g, lr=1e-2))
    run = trainer(tmp_path, steps=60)
    run.fit(made, GivenBatches([make_batch()], class_names=NAMES))
    assert run.callback_metrics["val_loss"] < 0.5 * math.log(K)
    assert run.callback_metrics["val_accuracy"] > 0.9


def test_berts_type_ids_reach_the_model_that_names_them_and_no_other():
    batch = {**make_batch(), "token_type_ids": torch.ones(12, T).long()}
    for kind, arrives in (("BERT", True), ("DistilBERT", False), ("encoder of ours", False)):
        made = module(MODELS[kind]).eval()
        plain = {k: v for k, v in batch.items() if k != "token_type_ids"}
        assert torch.equal(made._answer(batch)[1], made._answer(plain)[1]) != arrives


def test_the_head_does_not_go_to_muon_and_no_technique_touches_it():
    for kind, head in (("BERT", "classifier"), ("encoder of ours", "score")):
        made = module(MODELS[kind])
        groups = {id(p): group["name"] for group in parameter_groups(made) for p in group["params"]}
        assert groups[id(getattr(made.model, head).weight)] == "others"


# Numbers in place of classes


def test_with_one_class_the_labels_are_numbers(tmp_path):
    batch = {**make_batch(), "labels": torch.linspace(-1, 1, 12)}
    made = module(BERT, num_labels=1).eval()
    expected = made.model(**batch).loss
    summed, logits, _ = made._answer(batch)
    torch.testing.assert_close(summed / 12, expected, atol=1e-6, rtol=0)
    (logged,) = trainer(tmp_path).validate(made, GivenBatches([batch]), verbose=False)
    assert logged["val_loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert logged["val_mae"] == pytest.approx((logits[:, 0] - batch["labels"]).abs().mean().item(), abs=1e-6)
    (numbers,) = trainer(tmp_path).predict(made, GivenBatches([batch]))
    assert torch.equal(numbers, logits[:, 0])


# Evaluation


def by_definition(predicted, labels):
    """Accuracy, macro F1 and Matthews' correlation, from the table of counts."""
    table = torch.zeros(K, K)
    for p, y in zip(predicted.tolist(), labels.tolist()):
        table[y, p] += 1
    right, true, said, n = table.diag(), table.sum(1), table.sum(0), table.sum()
    f1 = (2 * right / (true + said)).mean()
    covariance = right.sum() * n - (true * said).sum()
    mcc = covariance / ((n**2 - (said**2).sum()) * (n**2 - (true**2).sum())).sqrt()
    return (right.sum() / n).item(), f1.item(), mcc.item()


def test_scores_are_as_defined_over_batches_of_unequal_size(tmp_path):
    made = module(optimizer=lambda g: torch.optim.Adam(g, lr=1e-2))
    trainer(tmp_path, steps=8).fit(made, GivenBatches([make_batch(5, 16)]))
    batches = [make_batch(0, 40), make_batch(1, 3), make_batch(2, 17)]
    for run, stage in ((trainer(tmp_path).validate, "val"), (trainer(tmp_path).test, "test")):
        (logged,) = run(made, GivenBatches(batches), verbose=False)
        logits = torch.cat([made.eval()._answer(b)[1] for b in batches])
        labels = torch.cat([b["labels"] for b in batches])
        assert logged[f"{stage}_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-5)
        scores = [logged[f"{stage}_{name}"] for name in ("accuracy", "f1", "mcc")]
        assert scores == pytest.approx(by_definition(logits.argmax(1), labels), abs=1e-5)


def test_prediction_is_the_probability_of_each_class(tmp_path):
    made, batch = module(), make_batch()
    unlabelled = {k: v for k, v in batch.items() if k != "labels"}
    (probabilities,) = trainer(tmp_path).predict(made, GivenBatches([unlabelled]))
    torch.testing.assert_close(probabilities, made.eval()._answer(batch)[1].softmax(-1))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(12))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2, 3), "batch is a Tensor"),
        ({"tokens": torch.zeros(2, 3)}, r"batch has \['tokens'\]"),
        ({"input_ids": torch.zeros(2, 3).long()}, r"wants batches with labels"),
    ],
    ids=["tensor", "other keys", "no labels"],
)
def test_a_batch_of_another_kind_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        module().training_step(batch, 0)


def test_a_model_that_says_not_how_many_classes_or_gives_no_logits_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Own does not say how many classes it has; give num_labels"):
        trainer(tmp_path, steps=1).fit(SequenceClassifier(Own()), GivenBatches([make_batch()]))
    with pytest.raises(ValueError, match=r"must be logits of shape \(batch, classes\)"):
        module(load_model(ENCODER, "masked"))._answer(make_batch())


# Classes


def test_the_classes_of_the_data_are_kept_in_checkpoint_and_folder(tmp_path):
    for kind, source in (
        ("ours", ENCODER),
        ("BERT", BERT),
        ("module", load_model({**BERT, "num_labels": K}, "classification")),
    ):
        made = SequenceClassifier(source, sgd, None)
        run = trainer(tmp_path, steps=2)
        run.fit(made, GivenBatches([make_batch()], class_names=NAMES))
        assert made.class_names == NAMES, kind
        run.save_checkpoint(tmp_path / "end.ckpt")
        again = SequenceClassifier.load_from_checkpoint(tmp_path / "end.ckpt")
        assert again.class_names == NAMES
        assert_same(again, made)
        made.save_pretrained(tmp_path / kind)
        folder = AutoModelForSequenceClassification.from_pretrained(tmp_path / kind)
        assert folder.config.id2label == dict(enumerate(NAMES))
        from_folder = SequenceClassifier.from_checkpoint(tmp_path / kind)
        assert from_folder.class_names == NAMES
        assert_same(from_folder, made)


def test_other_classes_than_the_models_are_refused(tmp_path):
    made = module()
    run = trainer(tmp_path, steps=1)
    run.fit(made, GivenBatches([make_batch()], class_names=NAMES))
    run.save_checkpoint(tmp_path / "end.ckpt")
    made.save_pretrained(tmp_path / "folder")
    for other in (["x", "y", "z"], NAMES[:2], NAMES[::-1]):
        again = SequenceClassifier.load_from_checkpoint(tmp_path / "end.ckpt")
        with pytest.raises(ValueError, match=r"The data has the classes .*has \['bad', 'fair', 'good'\]"):
            trainer(tmp_path).validate(again, GivenBatches([make_batch()], class_names=other), verbose=False)
    data = GivenBatches([make_batch(classes=2)], class_names=NAMES[:2])
    with pytest.raises(ValueError, match="head for 3 classes"):
        trainer(tmp_path).validate(SequenceClassifier(str(tmp_path / "folder")), data, verbose=False)


def test_a_number_of_classes_that_the_data_contradicts_is_refused(tmp_path):
    made = SequenceClassifier(ENCODER, num_labels=4)
    with pytest.raises(ValueError, match="num_labels=4, but the data has 3 classes"):
        trainer(tmp_path, steps=1).fit(made, GivenBatches([make_batch()], class_names=NAMES))


# Weights to start from


def pretrained(kind, tmp_path):
    """A language model's checkpoint, its folder, and the network it holds."""
    model, lm = (SLM, CausalLM) if kind == "decoder" else (BERT if kind == "BERT" else ENCODER, MaskedLM)
    made = lm(model, sgd, None, **({"mask_token_id": 1} if lm is MaskedLM else {}))
    run = trainer(tmp_path, steps=1)
    run.fit(made, GivenBatches([{"input_ids": make_batch()["input_ids"]}]))
    run.save_checkpoint(tmp_path / "lm.ckpt")
    made.save_pretrained(tmp_path / "lm")
    return model, made.model.base_model


@pytest.mark.parametrize("source", ["lm.ckpt", "lm", "lm/model.safetensors"])
@pytest.mark.parametrize("kind", ["encoder", "decoder", "BERT"])
def test_a_language_model_gives_all_but_its_head(kind, source, tmp_path):
    model, expected = pretrained(kind, tmp_path)
    made = module(model, init_weights_from=tmp_path / source)
    ours = dict(made.model.base_model.state_dict())
    new = {name for name in ours if name.startswith("pooler.")}
    assert bool(new) == (kind == "BERT")
    assert not differences({n: p for n, p in ours.items() if n not in new}, dict(expected.state_dict()))


def test_a_bare_backbones_folder_and_a_classifiers_own_weights_are_taken_too(tmp_path):
    made = module(BERT)
    made.model.base_model.save_pretrained(tmp_path / "bare")
    made.model.save_pretrained(tmp_path / "whole")
    again = module(BERT, init_weights_from=tmp_path / "bare")
    assert_same(again.model.base_model, AutoModel.from_pretrained(tmp_path / "bare"))
    assert_same(module(BERT, init_weights_from=tmp_path / "whole"), made)
    other = module(BERT, num_labels=5, init_weights_from=tmp_path / "whole")
    assert_same(other.model.base_model, made.model.base_model)


def test_weights_of_another_body_are_refused(tmp_path):
    pretrained("encoder", tmp_path)
    with pytest.raises(ValueError, match=r"does not fit SLMModel: missing: .*layers\.2"):
        module({**ENCODER, "pattern": "attn/mlp*3"}, init_weights_from=tmp_path / "lm.ckpt")


def test_a_folder_of_a_language_model_can_be_the_model_itself(tmp_path):
    _, expected = pretrained("encoder", tmp_path)
    made = SequenceClassifier(str(tmp_path / "lm"), sgd, None)
    trainer(tmp_path).validate(made, GivenBatches([make_batch()], class_names=NAMES), verbose=False)
    assert_same(made.model.model, expected)
    assert made.class_names == NAMES


# Runs


class NaN(Callback):
    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == 2:
            with torch.no_grad():
                pl_module.model.score.weight.fill_(float("nan"))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="loss is nan at step 2"):
        trainer(tmp_path, [NaN()]).fit(module(), GivenBatches([make_batch()]))


def test_micro_batches_of_unequal_size_train_as_one_large_batch(tmp_path):
    start = load_model({**ENCODER, "num_labels": K}, "classification").state_dict()
    micro = [make_batch(seed, rows) for seed, rows in enumerate((9, 1, 5, 2))]
    large = [{key: torch.cat([b[key] for b in micro]) for key in micro[0]}]
    ends = []
    for batches, accumulate in ((large, 1), (micro, 4)):
        made = module()
        made.model.load_state_dict(start)
        trainer(tmp_path, steps=1, accumulate_grad_batches=accumulate).fit(made, GivenBatches(batches))
        ends.append(made)
    for a, b in zip(ends[0].parameters(), ends[1].parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def table(tmp_path, rows=200):
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    lines = [f"{words[i % 7]} {words[i % 5]} {'x' * (i % 9)}\t{'even' if i % 2 else 'odd'}" for i in range(rows)]
    (tmp_path / "t.tsv").write_text("text\tlabel\n" + "\n".join(dict.fromkeys(lines)))
    return ClassificationData(
        tmp_path / "t.tsv", vocab_size=300, max_length=32, batch_size=8, cache_dir=tmp_path / "cache"
    )


def test_a_killed_run_on_a_table_ends_with_the_same_bits(tmp_path):
    ends = []
    for part in ("straight", "killed", "resumed"):
        torch.manual_seed(part == "resumed")
        made = SequenceClassifier({**ENCODER, "vocab_size": 300})
        if part == "killed":
            run = trainer(tmp_path, [SaveAndDie(tmp_path / "saved.ckpt", 9)], steps=20, enable_checkpointing=True)
            with pytest.raises(Killed):
                run.fit(made, table(tmp_path))
            continue
        run = trainer(tmp_path, steps=20)
        run.fit(made, table(tmp_path), ckpt_path=tmp_path / "saved.ckpt" if part == "resumed" else None)
        ends.append(learned(checkpoint(run)))
    assert not differences(*ends)


def test_from_masked_tokens_to_classes_with_one_tokenizer(tmp_path):
    """The checkpoint of the one is the start of the other, and its tokenizer; another one is refused."""
    data = table(tmp_path)
    data.prepare_data()
    ids = next(iter(data.train_dataloader()))["input_ids"]
    body = {**ENCODER, "vocab_size": 300}
    lm = MaskedLM(body, sgd, None, mask_token_id=0)
    run = trainer(tmp_path, steps=1)
    run.fit(lm, GivenBatches([{"input_ids": ids}], tokenizer=data.tokenizer))
    run.save_checkpoint(tmp_path / "lm.ckpt")
    same = ClassificationData(
        tmp_path / "t.tsv", tokenizer=tmp_path / "lm.ckpt", max_length=32, batch_size=8, cache_dir=tmp_path / "other"
    )
    trainer(tmp_path, steps=1).fit(SequenceClassifier(body, init_weights_from=tmp_path / "lm.ckpt"), same)
    assert same.tokenizer.get_vocab() == load_tokenizer(str(tmp_path / "lm.ckpt")).get_vocab()
    other = ClassificationData(
        tmp_path / "t.tsv", vocab_size=270, max_length=32, batch_size=8, cache_dir=tmp_path / "other"
    )
    with pytest.raises(ValueError, match="another tokenizer than the data"):
        trainer(tmp_path, steps=1).fit(SequenceClassifier(body, init_weights_from=tmp_path / "lm.ckpt"), other)


def test_texts_longer_than_the_models_positions_are_refused_before_training(tmp_path):
    data = table(tmp_path)
    data.max_length = 64
    with pytest.raises(ValueError, match="64 tokens is longer than the 32 positions of SLMForSequenceClassification"):
        trainer(tmp_path, steps=1).fit(SequenceClassifier({**ENCODER, "vocab_size": 300}), data)


# Real tasks


SMALL = dict(vocab_size=4096, hidden_size=128, intermediate_size=256, num_attention_heads=4, pattern="attn/mlp*2")


def scores(data, tmp_path, steps, **model):
    torch.set_num_threads(1)
    made = SequenceClassifier(
        {**SMALL, "causal": False, **model}, lambda g: MuonAdamW(g, lr=3e-3, muon_lr=0.02, weight_decay=0.1)
    )
    how = dict(val_check_interval=steps, check_val_every_n_epoch=None, limit_val_batches=28, gradient_clip_val=1.0)
    run = trainer(tmp_path, steps=steps, **how)
    run.fit(made, data)
    found = {name.removeprefix("val_"): value.item() for name, value in run.callback_metrics.items() if "val" in name}
    print(found)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* texts are longer than max_length")
@pytest.mark.parametrize(("causal", "accuracy"), [(False, 0.70), (True, 0.65)], ids=["encoder", "decoder"])
def test_the_mood_of_films_is_learned_in_half_a_minute(causal, accuracy, shared_data, tmp_path):
    """SST-2: 51 % of the sentences are positive."""
    data = ClassificationData(
        shared_data / "sst2" / "train.tsv.gz", shared_data / "sst2" / "dev.tsv", text="sentence", max_length=48
    )
    found = scores(data, tmp_path, 150, causal=causal)
    assert found["accuracy"] > accuracy
    assert found["mcc"] > 2 * accuracy - 1 - 0.05  # of two classes of one size it would be 2 * accuracy - 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* texts are longer than max_length")
def test_four_kinds_of_news_are_learned_in_half_a_minute(shared_data, tmp_path):
    """AG News: four classes of equal size."""
    data = ClassificationData(
        shared_data / "ag_news" / "train_head.csv.gz", text=1, label=0, max_length=32, val_fraction=0.1
    )
    found = scores(data, tmp_path, 300)
    assert found["accuracy"] > 0.75
    assert found["f1"] > 0.75
