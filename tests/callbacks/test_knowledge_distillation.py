"""KnowledgeDistillation on modules that are not ours, and on ours, against a loop written by hand."""

# Shape letters: B = batch, T = tokens, V = vocabulary, N = rows.

import argparse
import copy
import logging
import shutil
import subprocess
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import transformers
from jsonargparse import ArgumentParser
from support import (
    VOCABULARY,
    WINDOW,
    Demo,
    ForeignLlama,
    Notes,
    batches,
    checkpoint,
    differences,
    kill_and_resume,
    learned,
    trainer,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_slm import CausalLM, KnowledgeDistillation, NoEffectWarning, SLMConfig, SLMForCausalLM

TEMPERATURE, WEIGHT = 3.0, 0.7


def slm(layers: int = 1, **sizes) -> SLMForCausalLM:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pattern": f"attn/mlp*{layers}"}
    return SLMForCausalLM(
        SLMConfig(**{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, **heads, **sizes})
    )


def llama(**sizes) -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, **sizes}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1, **sizes))


class Foreign(ForeignLlama):
    """Someone's module around any network; ``step`` turns its output into what the training step returns."""

    def __init__(self, net: nn.Module | None = None, step=lambda output: output.loss) -> None:
        super().__init__()
        self.net, self.step = net or llama(), step

    def training_step(self, batch):
        return self.step(self.net(**batch))


def loader(micro_batches: list) -> DataLoader:
    """These micro-batches, in this order."""
    return DataLoader(micro_batches, batch_size=None)


def masked_batches() -> DataLoader:
    """Six micro-batches, each with another number of labels that count."""
    found = [dict(b) for b in batches(n=12)]
    for i, batch in enumerate(found):
        batch["labels"] = batch["labels"].clone()
        batch["labels"][0, : i + 1] = -100
    return loader(found)


HOSTS = {
    "demo": (Demo, Demo, lambda: loader(list(batches(pairs=True, n=12)))),
    "foreign llama": (Foreign, llama, masked_batches),
    "foreign slm": (lambda: Foreign(slm()), slm, masked_batches),
    "ours": (lambda: CausalLM(slm()), slm, masked_batches),
    "ours around llama": (lambda: CausalLM(llama()), llama, masked_batches),
}


def host(name: str):
    make, make_teacher, make_batches = HOSTS[name]
    torch.manual_seed(0)
    module = make()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    torch.manual_seed(1)
    return module, make_teacher(), make_batches()


def losses_by_hand(name: str, module, teacher, batch):
    """Task loss and distillation loss from whole logits and torch's own functions, in float64 behind the logits."""
    if name == "demo":
        student, target = module(*batch), batch[1].flatten()
        with torch.no_grad():
            answer = teacher(*batch)
    else:
        ids, target = batch["input_ids"], batch["labels"][:, 1:].flatten()
        network = getattr(module, "net", None) or module.model
        student = network(ids).logits[:, :-1].flatten(0, 1)
        with torch.no_grad():
            answer = teacher(ids).logits[:, :-1].flatten(0, 1)
    student, answer = student.double()[target != -100], answer.double()[target != -100]
    s, t = F.log_softmax(student / TEMPERATURE, -1), F.log_softmax(answer / TEMPERATURE, -1)
    kd = F.kl_div(s, t, log_target=True, reduction="sum") / len(s) * TEMPERATURE**2
    return F.cross_entropy(student, target[target != -100]), kd


@pytest.mark.parametrize("name", HOSTS)
def test_it_trains_as_a_loop_written_by_hand(name, tmp_path):
    module, teacher, data = host(name)
    twin, notes = copy.deepcopy(module), Notes()
    distil = KnowledgeDistillation(copy.deepcopy(teacher), temperature=TEMPERATURE, weight=WEIGHT)
    trainer(tmp_path, [distil], steps=6, logger=notes).fit(module, data)

    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for step, batch in enumerate(data):
        task, kd = losses_by_hand(name, twin.train(), teacher.eval(), batch)
        optimizer.zero_grad()
        ((1 - WEIGHT) * task + WEIGHT * kd).backward()
        optimizer.step()
        assert notes.steps[step]["slm/kd_loss"] == pytest.approx(kd.item(), rel=1e-4)
        assert notes.steps[step]["slm/task_loss"] == pytest.approx(task.item(), rel=1e-4)
    for (key, ours), theirs in zip(module.named_parameters(), twin.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=key)


def test_under_accumulation_every_token_of_ours_counts_alike(tmp_path):
    """Micro-batches of other numbers of tokens: accumulated, they give the step of one large batch."""
    ends = []
    for size, accumulate in ((12, 1), (2, 6)):
        module, teacher, data = host("ours")
        merged = {k: torch.cat([b[k] for b in data]) for k in ("input_ids", "labels")}
        distil = KnowledgeDistillation(teacher, temperature=TEMPERATURE, weight=WEIGHT)
        trainer(tmp_path, [distil], steps=1, accumulate_grad_batches=accumulate).fit(
            module, data if size == 2 else loader([merged])
        )
        ends.append(module.state_dict())
    for key in ends[0]:
        torch.testing.assert_close(ends[0][key], ends[1][key], rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize("name", HOSTS)
def test_student_and_teacher_run_once_each_and_only_the_training_loss_knows_the_teacher(name, tmp_path):
    module, teacher, data = host(name)
    plain = copy.deepcopy(module)
    network = module.net if hasattr(module, "net") else module.model
    blocks = [next(m for m in net.modules() if "Layer" in type(m).__name__ or type(m).__name__ == "Block")
              for net in (network, teacher)]  # fmt: skip
    calls = [0, 0]
    handles = [
        b.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1)) for i, b in enumerate(blocks)
    ]
    distil = KnowledgeDistillation(teacher)
    trainer(tmp_path, [distil], steps=4, accumulate_grad_batches=1).fit(module, data)
    # Whether a model splits into backbone and head is tried once both ways: the teacher here, CausalLM's own there.
    assert calls == [4 + 2 * ("ours" in name), 4 + 2 * (name != "demo")]

    for handle in handles:
        handle.remove()
    if hasattr(module, "validation_step"):
        values = [
            trainer(tmp_path, c).validate(plain, data, verbose=False) for c in ([], [KnowledgeDistillation(teacher)])
        ]
        assert values[0] == values[1]


@pytest.mark.parametrize("name", HOSTS)
def test_killed_and_resumed_it_is_the_same_run_bit_for_bit(name, tmp_path):
    make, make_teacher, _ = HOSTS[name]
    torch.manual_seed(1)
    teacher = make_teacher()
    straight, resumed = kill_and_resume(
        make, lambda: [KnowledgeDistillation(copy.deepcopy(teacher))], tmp_path, lambda: batches(pairs=name == "demo")
    )
    assert differences(learned(straight), learned(resumed)) == []
    assert any("KnowledgeDistillation" in key for key in straight["callbacks"])


def test_another_teacher_on_resume_is_refused(tmp_path):
    module, teacher, data = host("foreign llama")
    run = trainer(tmp_path, [KnowledgeDistillation(teacher)], steps=2)
    run.fit(module, data)
    checkpoint(run)
    with pytest.raises(ValueError, match="began with another teacher than LlamaForCausalLM"):
        trainer(tmp_path, [KnowledgeDistillation(llama())], steps=4).fit(module, data, ckpt_path=tmp_path / "end.ckpt")
    assert "training_step" not in vars(module)  # nothing is left on the module, though teardown was not called


@pytest.mark.parametrize("name", HOSTS)
def test_the_teacher_leaves_no_trace_in_checkpoint_module_or_itself(name, tmp_path):
    module, teacher, data = host(name)
    keys, modes = set(module.state_dict()), {m: m.training for m in teacher.modules()}
    teacher_before = copy.deepcopy(teacher.state_dict())
    run = trainer(tmp_path, [KnowledgeDistillation(teacher)], steps=3)
    run.fit(module, data)
    saved = checkpoint(run)
    assert set(saved["state_dict"]) == keys
    assert sum(len(g["params"]) for g in saved["optimizer_states"][0]["param_groups"]) == len(list(module.parameters()))
    assert differences(teacher.state_dict(), teacher_before) == []
    assert {m: m.training for m in teacher.modules()} == modes
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert "training_step" not in vars(module)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_evaluation_with_us_needs_no_teacher(tmp_path):
    module, teacher, data = host("foreign llama")
    teacher.save_pretrained(tmp_path / "teacher")
    distil = KnowledgeDistillation(str(tmp_path / "teacher"))
    run = trainer(tmp_path, [distil], steps=2)
    run.fit(module, data)
    checkpoint(run)
    shutil.rmtree(tmp_path / "teacher")
    trainer(tmp_path, [distil]).test(module, data, ckpt_path=tmp_path / "end.ckpt", verbose=False)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_skipped_batch_stays_skipped_and_a_dict_keeps_its_entries(tmp_path):
    seen = []

    class Watcher(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(outputs)

    turns = iter([False, True, False, True])
    module = Foreign(step=lambda out: {"loss": out.loss, "extra": "kept"} if next(turns) else None)
    teacher = llama()
    before = copy.deepcopy(module.net)
    run = trainer(tmp_path, [KnowledgeDistillation(teacher, weight=1.0), Watcher()], steps=4)
    run.fit(module, masked_batches())
    assert [bool(output) for output in seen] == [False, True, False, True]
    assert seen[1]["extra"] == "kept"
    ids, labels = masked_batches().dataset[1].values()
    keep = labels[:, 1:] != -100
    with torch.no_grad():
        s, t = ((net.eval()(ids).logits[:, :-1][keep] / 2).log_softmax(-1) for net in (before, teacher))
    expected = 4 * F.kl_div(s, t, log_target=True, reduction="sum") / keep.sum()
    assert seen[1]["loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_padding_counts_for_nothing_where_only_an_attention_mask_says_so(tmp_path):
    """The same ids with other tokens under the padding give the same distillation loss."""
    logged = []
    for junk in (0, 5):
        ids = torch.arange(1, 1 + WINDOW).repeat(2, 1)
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        ids[1, 4:] = junk
        torch.manual_seed(0)
        module, teacher = Foreign(step=lambda out: out.logits.sum() * 0), llama()
        notes = Notes()
        run = trainer(tmp_path, [KnowledgeDistillation(teacher, weight=1.0)], steps=1, logger=notes)
        run.fit(module, loader([{"input_ids": ids, "attention_mask": mask}]))
        logged.append(notes.steps[0]["slm/kd_loss"])
    assert logged[0] == logged[1] > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's, on the demo alone
@pytest.mark.parametrize("name", ["demo", "foreign llama", "ours"])
def test_compiled_submodules_learn_the_same(name, tmp_path):
    ends = []
    for compiled in (False, True):
        module, teacher, data = host(name)
        if compiled:
            (module.net if hasattr(module, "net") else module.model).compile(backend="eager")
            teacher.compile(backend="eager")
        trainer(tmp_path, [KnowledgeDistillation(teacher)], steps=4).fit(module, data)
        ends.append(module.state_dict())
    for key in ends[0]:
        torch.testing.assert_close(ends[0][key], ends[1][key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", HOSTS)
def test_bf16_mixed_stays_near_float32(name, tmp_path):
    logged = []
    for precision in ("32-true", "bf16-mixed"):
        module, teacher, data = host(name)
        notes = Notes()
        trainer(tmp_path, [KnowledgeDistillation(teacher)], steps=3, logger=notes, precision=precision).fit(
            module, data
        )
        logged.append([values["slm/kd_loss"] for values in notes.steps.values()])
    assert logged[1] == pytest.approx(logged[0], rel=0.05)
    assert logged[1] != logged[0]


def test_layers_born_in_configure_model_are_found(tmp_path):
    class Late(Foreign):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                torch.manual_seed(0)
                self.net = llama()

    notes, module = Notes(), Late()
    trainer(tmp_path, [KnowledgeDistillation(llama())], steps=2, logger=notes).fit(module, masked_batches())
    assert notes.steps[1]["slm/kd_loss"] > 0


@pytest.mark.parametrize("kind", ["folder", "checkpoint", "preset", "module of ours"])
def test_a_teacher_may_be_named(kind, tmp_path):
    teacher, sizes = slm(), {}
    if kind == "folder":
        teacher.save_pretrained(tmp_path / "teacher")
        source = str(tmp_path / "teacher")
    elif kind == "checkpoint":
        run, module = trainer(tmp_path, steps=1), CausalLM(teacher)
        run.fit(module, masked_batches())
        checkpoint(run, "teacher.ckpt")
        source = tmp_path / "teacher.ckpt"
    elif kind == "module of ours":
        source = CausalLM(teacher)
    else:
        source, sizes = "slm-5m", {"vocab_size": 4096}
    distil = KnowledgeDistillation(source)
    if kind == "preset":
        before = torch.get_rng_state()
        with pytest.warns(UserWarning, match="'slm-5m' is a preset: its weights are random"):
            loaded = [distil.load_teacher(), distil.load_teacher()]
        assert torch.equal(before, torch.get_rng_state())
        assert differences(loaded[0].state_dict(), loaded[1].state_dict()) == []
        return
    torch.testing.assert_close(distil.load_teacher().state_dict(), teacher.state_dict(), rtol=0, atol=0)
    notes = Notes()
    trainer(tmp_path, [distil], steps=2, logger=notes).fit(CausalLM(slm(**sizes)), masked_batches())
    assert notes.steps[1]["slm/kd_loss"] > 0


def test_a_teacher_that_caps_its_logits_is_not_split(tmp_path):
    """Gemma 2 puts a tanh on its logits: its head alone would give others."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    config = transformers.Gemma2Config(
        num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1, final_logit_softcapping=0.5, **sizes
    )
    module, _, data = host("ours")
    teacher = transformers.Gemma2ForCausalLM(config)
    twin, notes = copy.deepcopy(module), Notes()
    distil = KnowledgeDistillation(teacher, temperature=TEMPERATURE, weight=WEIGHT)
    trainer(tmp_path, [distil], steps=1, logger=notes).fit(module, data)
    _, kd = losses_by_hand("ours", twin, teacher.eval(), data.dataset[0])
    assert notes.steps[0]["slm/kd_loss"] == pytest.approx(kd.item(), rel=1e-4)


def held_out_nats(network: nn.Module, rows_NT: torch.Tensor) -> float:
    with torch.no_grad():
        logits = network.eval()(rows_NT).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), rows_NT[:, 1:].flatten()).item()


@pytest.mark.slow
def test_with_a_teacher_that_read_more_a_student_learns_more_from_little_text(tmp_path):
    """Real text, characters as tokens: the teacher saw all but the held-out rows, the students see 48 of them."""
    text = b"".join(Path(module.__file__).read_bytes() for module in (argparse, subprocess, logging))
    rows_NT = torch.tensor([c % 128 for c in text[: len(text) // 64 * 64]]).view(-1, 64)
    rows_NT = rows_NT[torch.randperm(len(rows_NT), generator=torch.Generator().manual_seed(0))]
    held_out, seen = rows_NT[:100], rows_NT[100:]

    def trained(rows, steps: int, callbacks=()) -> nn.Module:
        torch.manual_seed(1)
        module = CausalLM(slm(layers=2, vocab_size=128, hidden_size=64, intermediate_size=128), lr_scheduler=None)
        module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=5e-3)
        data = DataLoader([{"input_ids": r, "labels": r} for r in rows], batch_size=16, shuffle=True)
        trainer(tmp_path, callbacks, steps=steps, max_epochs=-1).fit(module, data)
        return module.model

    teacher = trained(seen, steps=200)
    alone, taught = trained(seen[:48], 100), trained(seen[:48], 100, [KnowledgeDistillation(teacher, 1.0, 0.9)])
    nats = {
        name: held_out_nats(network, held_out)
        for name, network in (("teacher", teacher), ("alone", alone), ("taught", taught))
    }
    print(nats)  # the card shows them
    assert nats["taught"] < nats["alone"] - 0.1


class Manual(Foreign):
    automatic_optimization = False


class InParts(pl.LightningModule):
    """Its logits are made by a head that no token ids go into."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def training_step(self, batch):
        return F.cross_entropy(self.head(self.embed(batch["input_ids"])).flatten(0, 1), batch["labels"].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def broken_llama() -> nn.Module:
    network = llama()
    network.lm_head.weight.data[0] = torch.nan
    return network


SHARED = Foreign()


@pytest.mark.parametrize(
    ("module", "distil", "message"),
    [
        (Manual(), {"teacher": llama()}, "optimises manually.*distillation_loss"),
        (
            Foreign(),
            {"teacher": llama(vocab_size=60)},
            r"64 entries and the teacher's 60.*resize_token_embeddings\(60\)",
        ),
        (CausalLM(slm()), {"teacher": slm(vocab_size=60)}, r"64 entries and the teacher's 60"),
        (Foreign(), {"teacher": llama(max_position_embeddings=4)}, "8 tokens in a row and the teacher.*=4"),
        (CausalLM(slm()), {"teacher": slm(max_position_embeddings=4)}, "8 tokens in a row and the teacher.*=4"),
        (Foreign(), {"teacher": broken_llama()}, "teacher LlamaForCausalLM gives nan or infinite logits at step 0"),
        (CausalLM(slm()), {"teacher": broken_llama()}, "teacher LlamaForCausalLM gives nan or infinite logits"),
        (SHARED, {"teacher": SHARED.net}, r"shares weights with Foreign.*copy.deepcopy\(model\)"),
        (Foreign(), {"teacher": llama(), "student": "nett"}, "student='nett' is no sub-module. Near names: 'net'"),
        (InParts(), {"teacher": llama()}, r"\['head'\]\) 0 did so.*student="),
        (Foreign(), {"teacher": Demo()}, "The teacher Demo cannot be called as the student was"),
        (Foreign(), {"teacher": "slm-5n"}, "neither a preset nor a folder.*slm-5m"),
        (Foreign(), {"teacher": "gone.ckpt"}, "gone.ckpt"),
    ],
    ids=lambda v: v[:24] if isinstance(v, str) else "",
)
def test_what_cannot_be_distilled_is_refused_with_the_way_out(module, distil, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        trainer(tmp_path, [KnowledgeDistillation(**distil)], steps=1).fit(module, masked_batches())


def test_a_module_whose_logits_no_ids_lead_to_can_be_named(tmp_path):
    notes = Notes()
    distil = KnowledgeDistillation(nn.Linear(8, VOCABULARY), student="head")
    trainer(tmp_path, [distil], steps=2, logger=notes).fit(InParts(), masked_batches())
    assert notes.steps[1]["slm/kd_loss"] > 0


@pytest.mark.parametrize("wrong", [{"temperature": 0}, {"weight": 1.1}, {"weight": -0.1}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be above 0, and weight=.* from 0 to 1"):
        KnowledgeDistillation("slm-5m", **wrong)


def test_weight_zero_says_that_it_has_no_effect(tmp_path):
    module, teacher, data = host("foreign llama")
    plain = copy.deepcopy(module)
    with pytest.warns(NoEffectWarning, match="does not use its teacher"):
        trainer(tmp_path, [KnowledgeDistillation(teacher, weight=0.0)], steps=2).fit(module, data)
    plain.configure_optimizers = lambda: torch.optim.SGD(plain.parameters(), lr=0.1)
    trainer(tmp_path, steps=2).fit(plain, data)
    assert differences(module.state_dict(), plain.state_dict()) == []


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ["foreign llama", "ours"])
def test_several_teachers_share_the_loss_in_any_order(name, turned, tmp_path):
    module, first, data = host(name)
    second, twin, notes = llama(), copy.deepcopy(module), Notes()
    distil = [KnowledgeDistillation(t, TEMPERATURE, w) for t, w in ((first, 0.3), (second, 0.2))]
    assert distil[0].state_key != distil[1].state_key
    trainer(tmp_path, distil[::-1] if turned else distil, steps=1, logger=notes).fit(module, data)
    assert "training_step" not in vars(module)

    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    (task, kd_first), (_, kd_second) = (losses_by_hand(name, twin, t.eval(), data.dataset[0]) for t in (first, second))
    (0.5 * task + 0.3 * kd_first + 0.2 * kd_second).backward()
    optimizer.step()
    for ours, theirs in zip(module.parameters(), twin.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    logged = [notes.steps[0][f"slm/kd_loss/{i}"] for i in ((1, 0) if turned else (0, 1))]
    assert logged == pytest.approx([kd_first.item(), kd_second.item()], rel=1e-4)
    assert notes.steps[0]["slm/task_loss"] == pytest.approx(task.item(), rel=1e-4)


def test_teachers_that_leave_the_task_less_than_nothing_are_refused(tmp_path):
    two = [KnowledgeDistillation(llama(), weight=w) for w in (0.7, 0.6)]
    with pytest.raises(ValueError, match=r"weights of 2 teachers add up to 1\.3"):
        trainer(tmp_path, two, steps=1).fit(Foreign(), masked_batches())


@pytest.mark.parametrize(
    "teacher",
    ["runs/dense.ckpt", {"class_path": "torch.nn.Linear", "init_args": {"in_features": 3, "out_features": 4}}],
)
def test_the_arguments_survive_yaml(teacher, tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--distil", type=pl.Callback)
    arguments = {"teacher": teacher, "temperature": 4.0, "weight": 0.25}
    given = {"distil": {"class_path": "lightning_slm.callbacks.KnowledgeDistillation", "init_args": arguments}}
    parser.save(parser.parse_object(given), tmp_path / "distil.yaml")
    made = parser.instantiate(parser.parse_args([f"--config={tmp_path / 'distil.yaml'}"])).distil
    assert (made.temperature, made.weight) == (4.0, 0.25)
    assert made.teacher == teacher if isinstance(teacher, str) else made.teacher.in_features == 3
