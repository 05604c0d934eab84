"""LLMInt8Precision: products in int8 in training as in evaluation, and checkpoints with and without it."""

import copy

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from support import ForeignLlama, batches, differences, kill_and_resume, learned, trainer

from lightning_slm.callbacks import KnowledgeDistillation
from lightning_slm.quantization.bnb import frozen_layers, llm_int8_
from lightning_slm.strategies.llm_int8_precision import LLMInt8Precision


@pytest.mark.parametrize("base", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_loss_falls_while_the_codes_stay(tmp_path, base):
    torch.manual_seed(0)
    module = ForeignLlama()
    plugin, before = LLMInt8Precision(base=base), copy.deepcopy(module)
    llm_int8_(before)
    losses = []
    for steps in (1, 40):
        run = trainer(tmp_path, steps=steps, plugins=[plugin])
        run.fit(module, batches())
        losses.append(float(run.callback_metrics["train_loss"]))
    assert losses[1] < losses[0] - 0.5
    assert len(plugin.converted) == 14
    for name, layer in frozen_layers(before).items():
        now = module.get_submodule(name)
        assert torch.equal(now.weight, layer.weight)
        assert torch.equal(now.statistics()["scale"], layer.statistics()["scale"])


@pytest.mark.parametrize("base", ["bf16-mixed", "bf16-true"])
def test_a_killed_run_goes_on_bit_identically(tmp_path, base):
    straight, resumed = kill_and_resume(ForeignLlama, list, tmp_path, plugins=[LLMInt8Precision(base=base)])
    assert differences(learned(straight), learned(resumed)) == []
    assert "LLMInt8Precision" not in straight, "nothing but plain weights is needed"


def test_a_checkpoint_loads_without_the_plugin_and_with_it_gives_the_run_s_own_figure(tmp_path):
    module = ForeignLlama()
    run = trainer(tmp_path, plugins=[LLMInt8Precision()])
    run.fit(module, batches())
    run.save_checkpoint(tmp_path / "end.ckpt")
    own = run.validate(module, batches(), verbose=False)
    plain = ForeignLlama.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    for name, layer in frozen_layers(module).items():
        assert torch.equal(plain.get_submodule(name).weight, layer.dequantized())
    for fresh in (ForeignLlama(), module):
        again = trainer(tmp_path, plugins=[LLMInt8Precision()])
        assert again.validate(fresh, batches(), tmp_path / "end.ckpt", verbose=False, weights_only=True) == own


def test_training_rounds_inputs_as_evaluation_does(tmp_path):
    """Their own layer does not, on a CPU: a loss in training would be another function's."""
    module = ForeignLlama()
    llm_int8_(module, threshold=0.0)
    batch = next(iter(batches()))
    assert torch.equal(module.train().net(**batch).loss, module.eval().net(**batch).loss)


def test_it_distils_as_student_and_as_teacher(tmp_path):
    teacher = ForeignLlama(hidden=64).net
    llm_int8_(teacher)
    module = ForeignLlama()
    run = trainer(tmp_path, [KnowledgeDistillation(teacher=teacher)], plugins=[LLMInt8Precision()])
    run.fit(module, batches())
    assert run.callback_metrics["slm/kd_loss"] > 0
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


def test_from_the_command_line_by_its_short_name(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["test"])
    cli = LightningCLI(
        ForeignLlama,
        trainer_defaults={"accelerator": "cpu", "logger": False, "default_root_dir": str(tmp_path)},
        args=["--trainer.plugins=LLMInt8Precision", "--trainer.plugins.threshold=3.5"],
        run=False,
        seed_everything_default=0,
    )
    plugin = cli.trainer.precision_plugin
    assert (type(plugin), plugin.threshold, plugin.base) == (LLMInt8Precision, 3.5, "bf16-mixed")
