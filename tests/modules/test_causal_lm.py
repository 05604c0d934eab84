"""CausalLM: any model, every token alike, checkpoints that stand alone."""

import json
import math
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from lightning_slm.models import SLMConfig
from lightning_slm.modules import CausalLM, CosineSchedule, MuonAdamW
from lightning_slm.modules.next_token import NextTokenLoss, next_labels

# Shape letters: B = batch, T = tokens, V = vocabulary.
V, T = 48, 12
SIZES = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
SLM = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=2,
    pattern="attn/mlp*2", max_position_embeddings=32,
)  # fmt: skip


def hugging_face(config):
    return AutoModelForCausalLM.from_config(config)


def llama(**changes):
    return hugging_face(LlamaConfig(**{**SIZES, **changes}))


class Own(nn.Module):
    """A module of the user's: forward(input_ids) gives logits, or whatever ``wrap`` makes of them."""

    def __init__(self, wrap=lambda logits: logits):
        super().__init__()
        self.wrap = wrap
        self.embed, self.hidden, self.out = nn.Embedding(V, 16), nn.Linear(16, 16), nn.Linear(16, V)

    def forward(self, ids):
        return self.wrap(self.out(torch.tanh(self.hidden(self.embed(ids)))))


class WithLogits:
    def __init__(self, logits):
        self.logits = logits


MODELS = {
    "configuration of ours": lambda: SLM,
    "configuration of Hugging Face": lambda: {"model_type": "llama", **SIZES},
    "Llama": llama,
    "GPT-2, tied": lambda: hugging_face(
        GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    ),
    "Gemma 2, capped logits": lambda: hugging_face(Gemma2Config(**SIZES, final_logit_softcapping=2.0)),
    "Cohere, scaled logits": lambda: hugging_face(CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"})),
    "Granite, scaled logits": lambda: hugging_face(
        GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=3.0)
    ),
    "own, logits": Own,
    "own, object": lambda: Own(WithLogits),
    "own, dict": lambda: Own(lambda logits: {"logits": logits}),
}
CALLED_WHOLE = {name for name in MODELS if "scaled" in name or "capped" in name or "own" in name}


def make_batch(seed, rows=4, keep=1.0):
    """Random ids; only a fraction of the labels counts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (rows, T), generator=generator)
    dropped = torch.rand((rows, T), generator=generator) > keep
    return {"input_ids": ids, "labels": ids.masked_fill(dropped, -100)}


def joined(batches):
    return {key: torch.cat([b[key] for b in batches]) for key in batches[0]}


class Batches(LightningDataModule):
    """Given batches, in order, for every stage."""

    def __init__(self, batches, **attributes):
        super().__init__()
        self.batches = batches
        vars(self).update(attributes)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.batches, batch_size=None)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class RandomData(Batches):
    """Batches for a command line, which cannot give any."""

    def __init__(self):
        super().__init__([make_batch(i) for i in range(2)])


def quiet_trainer(tmp_path, **arguments):
    defaults = dict(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    return Trainer(**{**defaults, **arguments})


def naive_nats(model, batch):
    """Summed next-token cross-entropy from all logits, and the number of labels."""
    out = model(batch["input_ids"])
    logits = out if isinstance(out, torch.Tensor) else out["logits"] if isinstance(out, dict) else out.logits
    targets = batch["labels"][:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum"), (targets != -100).sum()


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.5)


def trained(tmp_path, batches, **trainer):
    module = CausalLM(SLM, optimizer=sgd, lr_scheduler=None)
    quiet_trainer(tmp_path, **trainer).fit(module, Batches(batches))
    return module


def assert_same_weights(a, b, atol):
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


# Any model


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_trains_and_its_loss_is_that_of_all_logits(kind, tmp_path):
    module = CausalLM(MODELS[kind](), optimizer=sgd, lr_scheduler=None)
    module.configure_model()
    assert module._loss.in_parts == (kind not in CALLED_WHOLE)
    batch = make_batch(0, keep=0.7)
    module.eval()
    expected, tokens = naive_nats(module.model, batch)
    expected.backward()
    gradients = [p.grad.clone() for p in module.model.parameters()]
    module.zero_grad()
    loss = module._loss(batch, next_labels(batch))
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=0)
    for p, gradient in zip(module.model.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-4)
    trainer = quiet_trainer(tmp_path, max_epochs=4)
    trainer.fit(module.train(), Batches([make_batch(0)]))
    assert trainer.callback_metrics["train_loss"] < expected / tokens


def test_attention_mask_and_position_ids_reach_the_model_and_padding_has_no_loss():
    module = CausalLM(llama())
    module.configure_model()
    batch = make_batch(0, rows=2)
    batch["attention_mask"] = torch.ones(2, T, dtype=torch.long)
    batch["attention_mask"][0, 8:] = 0
    short = {"input_ids": batch["input_ids"][:1, :8], "labels": batch["labels"][:1, :8]}
    whole = {"input_ids": batch["input_ids"][1:], "labels": batch["labels"][1:]}
    expected = naive_nats(module.model, short)[0] + naive_nats(module.model, whole)[0]
    torch.testing.assert_close(module._loss(batch, next_labels(batch)), expected, atol=1e-4, rtol=0)
    packed = {k: torch.cat([short[k], short[k]], dim=1) for k in short}
    packed["labels"][0, 8] = -100
    packed["position_ids"] = torch.arange(8).repeat(2)[None]
    loss = module._loss(packed, next_labels(packed))
    torch.testing.assert_close(loss, 2 * naive_nats(module.model, short)[0], atol=1e-4, rtol=0)


def test_position_ids_that_a_model_does_not_take_are_refused():
    batch = {**make_batch(0), "position_ids": torch.arange(T)[None]}
    with pytest.raises(ValueError, match=r"\['position_ids'\], but Own.forward does not take them.*document_mask"):
        NextTokenLoss(Own())(batch, next_labels(batch))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2, 3), "batch is a Tensor"),
        ({"tokens": torch.zeros(2, 3)}, r"batch has \['tokens'\]"),
        ({"input_ids": torch.zeros(2, 1)}, "no next token"),
    ],
    ids=["tensor", "other keys", "one token"],
)
def test_a_batch_that_predicts_nothing_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        next_labels(batch)


def test_a_model_without_logits_is_refused():
    batch = make_batch(0)
    with pytest.raises(ValueError, match="returned str"):
        NextTokenLoss(Own(lambda logits: "logits"))(batch, next_labels(batch))


def test_a_window_longer_than_the_positions_is_refused_before_training_and_at_the_step(tmp_path):
    module = CausalLM(llama(max_position_embeddings=8))
    with pytest.raises(ValueError, match=r"12 tokens is longer than the 8 positions of LlamaForCausalLM.*=12"):
        quiet_trainer(tmp_path).fit(module, Batches([make_batch(0)], window=T))
    with pytest.raises(ValueError, match="12 tokens is longer"):
        quiet_trainer(tmp_path).fit(module, Batches([make_batch(0)]))


def test_a_head_that_is_replaced_later_is_the_one_that_learns():
    """As quantisation-aware training does."""
    module = CausalLM(SLM)
    module.configure_model()
    module.model.lm_head = nn.Linear(32, V)
    batch = make_batch(0)
    loss = module._loss(batch, next_labels(batch))
    torch.testing.assert_close(loss, naive_nats(module.model, batch)[0], atol=1e-4, rtol=0)


def test_overrides_change_the_configuration_and_are_refused_where_weights_exist():
    module = CausalLM(SLM, overrides={"vocab_size": 50})
    module.configure_model()
    assert module.model.lm_head.out_features == 50
    with pytest.raises(ValueError, match="vocab_size"):
        CausalLM(llama(), overrides={"vocab_size": 50})


# Every token counts alike


@pytest.mark.parametrize("clip", [None, 0.1], ids=["", "clipped"])
def test_micro_batches_with_very_different_numbers_of_tokens_train_as_one_large_batch(tmp_path, clip):
    keeps = [1.0, 0.1, 0.5, 0.02, 0.9, 0.2, 0.3]  # seven: the last window of the epoch has three of four
    micro = [make_batch(i, keep=keep) for i, keep in enumerate(keeps)]
    large = [joined(micro[:4]), joined(micro[4:])]
    model = CausalLM(SLM)
    model.configure_model()
    start = model.model.state_dict()
    results = []
    for batches, accumulate in ((large, 1), (micro, 4)):
        module = CausalLM(SLM, optimizer=sgd, lr_scheduler=None)
        module.configure_model()
        module.model.load_state_dict(start)
        trainer = quiet_trainer(tmp_path, accumulate_grad_batches=accumulate, gradient_clip_val=clip, max_epochs=2)
        trainer.fit(module, Batches(batches))
        results.append((module, trainer.callback_metrics["train_loss"].item(), trainer.global_step))
    assert results[0][2] == results[1][2] == 4
    assert_same_weights(results[0][0], results[1][0], atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-6)


def test_train_loss_is_the_mean_over_the_tokens_of_the_whole_step(tmp_path):
    batches = [make_batch(0, keep=1.0), make_batch(1, keep=0.1)]
    module = CausalLM(SLM, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0), lr_scheduler=None)
    trainer = quiet_trainer(tmp_path, accumulate_grad_batches=2)
    trainer.fit(module, Batches(batches))
    nats, tokens = naive_nats(module.model, joined(batches))
    assert trainer.callback_metrics["train_loss"].item() == pytest.approx((nats / tokens).item(), abs=1e-5)


def test_a_micro_batch_without_any_label_changes_nothing(tmp_path):
    torch.manual_seed(0)
    with_empty = trained(tmp_path, [make_batch(0, keep=0.0), make_batch(1)], accumulate_grad_batches=2)
    torch.manual_seed(0)
    without = trained(tmp_path, [make_batch(1)])
    assert_same_weights(with_empty, without, atol=1e-6)


def test_two_ranks_with_unequal_tokens_train_as_one_process(tmp_path):
    """DDP on gloo, accumulating two micro-batches on each rank, against one process with all four as one batch."""
    script = tmp_path / "ranks.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, sys
            rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, NODE_RANK="0", LOCAL_RANK=str(rank),
                              RANK=str(rank), WORLD_SIZE="2", GLOO_SOCKET_IFNAME="lo")
            sys.path.insert(0, {str(__file__).rsplit("/", 1)[0]!r})
            import torch
            import test_causal_lm as t

            module = t.CausalLM(t.SLM, optimizer=t.sgd, lr_scheduler=None)
            module.configure_model()
            module.model.load_state_dict(torch.load(folder + "/start"))
            batches = torch.load(folder + "/batches")
            trainer = t.quiet_trainer(folder, devices=2, strategy="ddp", accumulate_grad_batches=2,
                                      use_distributed_sampler=False)
            trainer.fit(module, t.Batches(batches[rank::2]))
            if rank == 0:
                torch.save((module.model.state_dict(), trainer.callback_metrics["train_loss"]), folder + "/end")
            """
        )
    )
    batches = [make_batch(i, keep=keep) for i, keep in enumerate([1.0, 0.1, 0.5, 0.05])]
    module = CausalLM(SLM, optimizer=sgd, lr_scheduler=None)
    module.configure_model()
    torch.save(module.model.state_dict(), tmp_path / "start")
    torch.save(batches, tmp_path / "batches")
    port = str(20000 + hash(str(tmp_path)) % 20000)
    ranks = [subprocess.Popen([sys.executable, script, str(r), port, tmp_path]) for r in range(2)]
    try:
        trainer = quiet_trainer(tmp_path)
        trainer.fit(module, Batches([joined(batches)]))
        assert [process.wait(timeout=240) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    state, loss = torch.load(tmp_path / "end")
    for name, value in module.model.state_dict().items():
        torch.testing.assert_close(state[name], value, atol=1e-6, rtol=0)
    torch.testing.assert_close(loss, trainer.callback_metrics["train_loss"], atol=1e-5, rtol=0)


def test_an_added_loss_sees_every_position_once_and_joins_the_optimised_loss(tmp_path):
    module = CausalLM(SLM, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0), lr_scheduler=None)
    module.configure_model()
    batch, seen = make_batch(0, keep=0.5), []

    def penalty(logits, labels, rows):
        seen.append((rows.start, rows.stop, labels))
        return 0.3 * logits.square().mean(1)[labels != -100].sum()

    handle = module.add_logits_loss(penalty, ce_weight=0.25)
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, Batches([batch]))
    targets = batch["labels"][:, 1:].flatten()
    assert torch.equal(torch.cat([labels for _, _, labels in seen]), targets)
    assert [start for start, _, _ in seen] == [0, *[stop for _, stop, _ in seen][:-1]]
    logits = module.model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    nats, tokens = naive_nats(module.model, batch)
    expected = (0.25 * nats + 0.3 * logits.square().mean(1)[targets != -100].sum()) / tokens
    assert trainer.callback_metrics["train_loss"].item() == pytest.approx(expected.item(), abs=1e-5)
    handle.remove()
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, Batches([batch]))
    assert trainer.callback_metrics["train_loss"].item() == pytest.approx((nats / tokens).item(), abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_learns_to_about_the_loss_of_float32(tmp_path, precision):
    losses = []
    for p in ("32-true", precision):
        torch.manual_seed(0)
        trainer = quiet_trainer(tmp_path, precision=p, max_epochs=8)
        trainer.fit(CausalLM(SLM, lr_scheduler=None), Batches([make_batch(0)]))
        losses.append(trainer.callback_metrics["train_loss"].item())
    assert losses[1] == pytest.approx(losses[0], abs=0.15)
    assert losses[1] < math.log(V) - 0.3


# A loss that is not finite


class Break(Callback):
    """Lets the model give NaN from the given step on."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            pl_module.model.broken = True


class Breakable(Own):
    broken = False

    def forward(self, ids):
        return super().forward(ids) * (float("nan") if self.broken else 1.0)


def test_a_nan_loss_stops_the_run_with_its_step_and_leaves_the_last_good_weights_and_checkpoint(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True, save_on_exception=True)
    module = CausalLM(Breakable(), lr_scheduler=None)
    trainer = quiet_trainer(tmp_path, enable_checkpointing=True, callbacks=[Break(3), checkpoint])
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 3 \(epoch 0\).*last checkpoint: '.*last"):
        trainer.fit(module, Batches([make_batch(i) for i in range(6)]))
    assert all(p.isfinite().all() for p in module.parameters())
    assert trainer.global_step == 3
    last = torch.load(checkpoint.last_model_path, weights_only=True)
    assert last["global_step"] in (2, 3)
    assert all(value.isfinite().all() for value in last["state_dict"].values())


# Evaluation


def test_evaluation_is_token_correct_over_unequal_batches(tmp_path):
    batches = [make_batch(0, rows=1, keep=0.2), make_batch(1, rows=4)]
    data = Batches(batches, bytes_per_token=lambda split: {"val": 2.5, "test": 4.0}[split])
    module = CausalLM(SLM)
    trainer = quiet_trainer(tmp_path)
    for run, stage, size in ((trainer.validate, "val", 2.5), (trainer.test, "test", 4.0)):
        (logged,) = run(module, data, verbose=False)
        nats, tokens = (sum(x).item() for x in zip(*(naive_nats(module.model, b) for b in batches)))
        assert logged[f"{stage}_loss"] == pytest.approx(nats / tokens, abs=1e-5)
        assert logged[f"{stage}_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
        assert logged[f"{stage}_bits_per_byte"] == pytest.approx(nats / math.log(2) / (tokens * size), abs=1e-5)


def test_several_validation_sets_are_measured_apart(tmp_path):
    module = CausalLM(SLM)
    data = Batches([])
    sets = [[make_batch(0)], [make_batch(1), make_batch(2)]]
    data.val_dataloader = lambda: [torch.utils.data.DataLoader(s, batch_size=None) for s in sets]
    logged = quiet_trainer(tmp_path).validate(module, data, verbose=False)
    for i, batches in enumerate(sets):
        nats, tokens = (sum(x).item() for x in zip(*(naive_nats(module.model, b) for b in batches)))
        assert logged[i][f"val_loss/dataloader_idx_{i}"] == pytest.approx(nats / tokens, abs=1e-5)


def test_prediction_is_the_mean_nats_of_each_sequence(tmp_path):
    batch = make_batch(0, keep=0.6)
    module = CausalLM(SLM)
    (nats,) = quiet_trainer(tmp_path).predict(module, Batches([batch]))
    for row in range(4):
        expected, tokens = naive_nats(module.model, {k: v[row : row + 1] for k, v in batch.items()})
        assert nats[row].item() == pytest.approx((expected / tokens).item(), abs=1e-5)


# Optimizer and schedule


class Rates(Callback):
    """Learning rates of each step, by group."""

    def __init__(self):
        self.seen = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.seen.append([group["lr"] for group in optimizer.param_groups])


def test_the_default_optimizer_is_one_with_groups_and_every_group_follows_the_schedule(tmp_path):
    rates = Rates()
    module = CausalLM(llama(), lr_scheduler=CosineSchedule(warmup=0.25))
    trainer = quiet_trainer(tmp_path, max_steps=8, max_epochs=None, callbacks=[rates])
    trainer.fit(module, Batches([make_batch(i) for i in range(4)]))
    (optimizer,) = trainer.optimizers
    assert isinstance(getattr(optimizer, "optimizer", optimizer), MuonAdamW)
    assert [group["name"] for group in optimizer.param_groups] == ["matrices", "others", "no_decay"]
    factors = [CosineSchedule(warmup=0.25)(step, 8) for step in range(8)]
    for i, base in enumerate([0.02, 1e-2, 1e-2]):
        assert [r[i] for r in rates.seen] == pytest.approx([base * f for f in factors])


def test_a_schedule_needs_a_run_of_known_length(tmp_path):
    with pytest.raises(ValueError, match=r"no known number of steps.*max_steps"):
        quiet_trainer(tmp_path, max_epochs=-1).fit(CausalLM(SLM), Batches([make_batch(0)]))


def test_schedulers_of_torch_move_at_every_step_and_plateau_by_the_validation_loss(tmp_path):
    rates = Rates()
    module = CausalLM(SLM, optimizer=sgd, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.1))
    quiet_trainer(tmp_path, callbacks=[rates]).fit(module, Batches([make_batch(i) for i in range(4)]))
    assert [r[0] for r in rates.seen] == pytest.approx([0.5, 0.5, 0.05, 0.05])
    plateau = CausalLM(
        SLM,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-9),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.1, patience=0, eps=0.0),
    )
    trainer = quiet_trainer(tmp_path, max_epochs=3)
    trainer.fit(plateau, Batches([make_batch(0)]))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-11)


@pytest.mark.parametrize(
    ("arguments", "optimizer", "scheduler"),
    [
        ([], {"class_path": "lightning_slm.MuonAdamW", "lr": 1e-2}, "WSDSchedule"),
        (
            ["--model.optimizer=lightning_slm.MuonAdamW", "--model.optimizer.muon_lr=0.1"],
            {"class_path": "lightning_slm.MuonAdamW", "muon_lr": 0.1},
            "WSDSchedule",
        ),
        (
            ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.5", "--model.lr_scheduler=null"],
            {"class_path": "torch.optim.AdamW", "lr": 0.5},
            None,
        ),
        (
            ["--model.lr_scheduler=lightning_slm.modules.CosineSchedule", "--model.lr_scheduler.warmup=0.3"],
            {"class_path": "lightning_slm.MuonAdamW"},
            "CosineSchedule",
        ),
        (
            ["--model.lr_scheduler=torch.optim.lr_scheduler.StepLR", "--model.lr_scheduler.step_size=3"],
            {"class_path": "lightning_slm.MuonAdamW"},
            "StepLR",
        ),
    ],
    ids=["default", "MuonAdamW", "AdamW", "cosine", "StepLR"],
)
def test_optimizer_and_schedule_are_chosen_on_the_command_line_and_survive_yaml(
    arguments, optimizer, scheduler, tmp_path
):
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(CausalLM, "model")
    written = parser.dump(parser.parse_args([f"--model.model={json.dumps(SLM)}", *arguments]), skip_unset=False)
    module = parser.instantiate(parser.parse_string(written)).model
    trainer = quiet_trainer(tmp_path, max_steps=2, max_epochs=None)
    trainer.fit(module, Batches([make_batch(0)]))
    made = getattr(trainer.optimizers[0], "optimizer", trainer.optimizers[0])
    assert type(made).__name__ == optimizer.pop("class_path").rpartition(".")[2]
    for name, value in optimizer.items():
        group = 0 if name == "muon_lr" else -1
        assert made.param_groups[group].get("initial_lr", made.param_groups[group]["lr"]) == value
    name = type(module._make_scheduler).__name__ if scheduler not in (None, "StepLR") else None
    assert name in (None, scheduler)
    assert len(trainer.lr_scheduler_configs) == (scheduler is not None)


# Checkpoints


def word_tokenizer(extra=0):
    words = {"<|end|>": 0, **{f"w{i}": i + 1 for i in range(9 + extra)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def saved(tmp_path, model, weights_only=False, **data):
    module = CausalLM(model)
    trainer = quiet_trainer(tmp_path, max_steps=2, max_epochs=None, enable_checkpointing=True)
    trainer.fit(module, Batches([make_batch(i) for i in range(2)], **data))
    path = tmp_path / "saved.ckpt"
    trainer.save_checkpoint(path, weights_only=weights_only)
    return module, path


@pytest.mark.parametrize("kind", ["configuration of ours", "configuration of Hugging Face", "Llama", "GPT-2, tied"])
def test_a_checkpoint_alone_gives_the_model_back(kind, tmp_path):
    module, path = saved(tmp_path, MODELS[kind](), weights_only=kind == "Llama")
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"model.{k}" for k in module.model.state_dict()}
    again = CausalLM.load_from_checkpoint(path)
    ids = make_batch(9)["input_ids"]
    module.eval()
    again.eval()
    assert torch.equal(again.model(ids).logits, module.model(ids).logits)


def test_a_module_of_the_users_own_must_be_given_again(tmp_path):
    module, path = saved(tmp_path, Own())
    with pytest.raises(ValueError, match=r"a module of your own, .*Own.*model=\.\.\."):
        CausalLM.load_from_checkpoint(path)
    again = CausalLM.load_from_checkpoint(path, model=Own())
    assert_same_weights(again, module, atol=0)


def test_a_killed_run_continues_to_the_same_bits(tmp_path):
    data = Batches([make_batch(i) for i in range(3)])
    trainer = dict(max_steps=6, max_epochs=None, accumulate_grad_batches=1)
    torch.manual_seed(0)
    whole = CausalLM(SLM)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    quiet_trainer(tmp_path, **trainer, enable_checkpointing=True, callbacks=[keep]).fit(whole, data)
    torch.manual_seed(7)
    resumed = CausalLM(SLM)
    quiet_trainer(tmp_path, **trainer, enable_checkpointing=True, callbacks=[keep]).fit(
        resumed, data, ckpt_path=tmp_path / "step=3.ckpt"
    )
    assert_same_weights(resumed, whole, atol=0)


@pytest.mark.parametrize("kind", ["checkpoint", "folder", "safetensors"])
def test_a_run_starts_from_given_weights_but_a_resumed_or_loaded_one_does_not_need_them(kind, tmp_path):
    module, path = saved(tmp_path, SLM)
    module.save_pretrained(tmp_path / "folder")
    source = {
        "checkpoint": path,
        "folder": tmp_path / "folder",
        "safetensors": tmp_path / "folder" / "model.safetensors",
    }[kind]
    second = CausalLM(SLM, init_weights_from=source, optimizer=lambda g: torch.optim.SGD(g, lr=0.0))
    trainer = quiet_trainer(tmp_path, max_steps=2, max_epochs=None)
    trainer.fit(second, Batches([make_batch(0)]))
    assert_same_weights(second, module, atol=0)
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    gone = CausalLM(SLM, init_weights_from=tmp_path / "gone.ckpt")
    quiet_trainer(tmp_path).validate(gone, Batches([make_batch(0)]), ckpt_path=tmp_path / "second.ckpt", verbose=False)
    assert_same_weights(gone, module, atol=0)
    assert_same_weights(CausalLM.load_from_checkpoint(tmp_path / "second.ckpt"), module, atol=0)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    _, path = saved(tmp_path, SLM)
    deeper = CausalLM({**SLM, "pattern": "attn/mlp*3", "vocab_size": V + 1}, init_weights_from=path)
    with pytest.raises(ValueError, match=r"does not fit SLMForCausalLM: missing: .*layers\.2.*shape: .*embed_tokens"):
        deeper.configure_model()
    absent = CausalLM(SLM, init_weights_from=tmp_path / "nothing.ckpt")
    with pytest.raises(FileNotFoundError, match=r"nothing\.ckpt': there is no such file or folder"):
        quiet_trainer(tmp_path).fit(absent, Batches([make_batch(0)]))


def test_the_tokenizer_travels_in_the_checkpoint_and_another_one_is_refused(tmp_path):
    tokenizer = word_tokenizer()
    _, path = saved(tmp_path, SLM, tokenizer=tokenizer)
    assert isinstance(torch.load(path, weights_only=True)["slm_tokenizer"], str)
    again = CausalLM.load_from_checkpoint(path)
    assert again.tokenizer("w3 w1 w8").input_ids == tokenizer("w3 w1 w8").input_ids
    assert again.tokenizer.eos_token == "<|end|>"
    other = Batches([make_batch(0)], tokenizer=word_tokenizer(extra=1))
    with pytest.raises(ValueError, match="another tokenizer than the checkpoint"):
        quiet_trainer(tmp_path).validate(CausalLM(SLM), other, ckpt_path=path, verbose=False)
    large = Batches([make_batch(0)], tokenizer=word_tokenizer(extra=V))
    with pytest.raises(ValueError, match=f"tokens, but the model's vocabulary only {V}"):
        quiet_trainer(tmp_path).fit(CausalLM(SLM), large)


def test_save_pretrained_and_from_checkpoint_give_model_and_tokenizer_back(tmp_path):
    module, path = saved(tmp_path, SLM, tokenizer=word_tokenizer())
    module.save_pretrained(tmp_path / "folder")
    for source in (path, tmp_path / "folder"):
        again = CausalLM.from_checkpoint(source)
        assert_same_weights(again, module, atol=0)
        assert again.tokenizer("w3").input_ids == [4]
    with pytest.raises(ValueError, match="Own has no save_pretrained"):
        CausalLM(Own()).save_pretrained(tmp_path / "own")


def test_a_checkpoint_of_lightning_cli_gives_the_model_back_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    LightningCLI(
        CausalLM,
        RandomData,
        args=["fit", "--seed_everything=0", f"--model.model={json.dumps(SLM)}", "--model.optimizer=torch.optim.AdamW",
              "--model.optimizer.lr=0.01", "--trainer.max_steps=2", f"--trainer.default_root_dir={tmp_path}", *quiet],
    )  # fmt: skip
    (path,) = tmp_path.rglob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    again = CausalLM.load_from_checkpoint(path)
    for name, value in checkpoint["state_dict"].items():
        assert torch.equal(again.state_dict()[name], value)


# Compilation


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:The .grad attribute")  # Dynamo's own
def test_compiled_blocks_leave_keys_and_losses_as_they_were(tmp_path):
    torch.manual_seed(0)
    eager, compiled = CausalLM(SLM, optimizer=sgd, lr_scheduler=None), CausalLM(SLM, sgd, None, compile=True)
    eager.configure_model()
    compiled.configure_model()
    compiled.model.load_state_dict(eager.model.state_dict())
    called = []
    compiled.model.model.layers[0].token_mixer.register_forward_hook(lambda *_: called.append(1))
    for module in (eager, compiled):
        quiet_trainer(tmp_path, max_steps=2, max_epochs=None).fit(module, Batches([make_batch(0)]))
    assert called
    assert_same_weights(eager, compiled, atol=1e-5)


def test_a_model_without_repeated_blocks_cannot_be_compiled_by_us():
    with pytest.raises(ValueError, match="Own has no repeated blocks"):
        CausalLM(Own(), compile=True).configure_model()


def test_a_configuration_of_ours_as_an_object_is_taken_too():
    module = CausalLM(SLMConfig(**SLM))
    module.configure_model()
    assert module.model.config.hidden_size == 32
