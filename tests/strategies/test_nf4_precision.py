"""NF4Precision: what trains and what does not, checkpoints with and without it, and whom it refuses."""

import copy

import peft
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.cli import LightningCLI
from support import ForeignLlama, Notes, batches, differences, kill_and_resume, learned, tiny_llama, trainer

from lightning_slm.callbacks import GradualPruning, KnowledgeDistillation, QuantizationAwareTraining
from lightning_slm.errors import NoEffectWarning
from lightning_slm.quantization.bnb import frozen_layers, nf4_
from lightning_slm.strategies.nf4_precision import NF4Precision

# peft 0.21.2 asks for it by that name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def precision(**kwargs):
    return NF4Precision(**{"block": 32, **kwargs})


class QLoRA(LightningModule):
    """Adapters on a tiny Llama, in ten lines of someone else's."""

    def __init__(self, dropout=0.1):
        super().__init__()
        config = peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", lora_dropout=dropout)
        self.net = peft.get_peft_model(tiny_llama(tied=False), config).train()

    def training_step(self, batch):
        loss = self.net(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch):
        self.log("val_loss", self.net(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


def fit(folder, module, *callbacks, plugin=None, steps=8, **kwargs):
    run = trainer(folder, callbacks, steps=steps, plugins=[plugin or precision()], **kwargs)
    run.fit(module, batches(), batches())
    return run


@pytest.mark.parametrize("base", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_loss_falls_while_the_codes_and_what_they_are_multiplied_by_stay(tmp_path, base):
    torch.manual_seed(0)
    module = ForeignLlama()
    plugin, before = precision(base=base), copy.deepcopy(module)
    nf4_(before, block=32)
    losses = [float(fit(tmp_path, module, plugin=plugin, steps=n).callback_metrics["train_loss"]) for n in (1, 40)]
    assert losses[1] < losses[0] - 0.5
    assert plugin.converted == list(frozen_layers(before))
    assert len(plugin.converted) == 14
    for name, layer in frozen_layers(before).items():
        now = module.get_submodule(name)
        assert torch.equal(now.weight, layer.weight)
        assert differences(now.statistics(), layer.statistics()) == []
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in ForeignLlama().named_parameters()} - {
        f"{n}.weight" for n in plugin.converted
    }


def test_qlora_adapters_learn_on_a_frozen_base(tmp_path):
    torch.manual_seed(0)
    module = QLoRA(dropout=0.0)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    notes = Notes()
    trainer(tmp_path, steps=20, plugins=[precision()], logger=notes).fit(module, batches(n=2))
    assert notes.steps[19]["train_loss"] < notes.steps[0]["train_loss"] - 0.5
    for name, p in module.named_parameters():
        changed = p.shape == before[name].shape and not torch.equal(p, before[name])
        assert changed is ("lora_" in name), name
    assert len(frozen_layers(module)) == 14


@pytest.mark.parametrize("base", ["bf16-mixed", "bf16-true"])
def test_a_killed_run_of_qlora_goes_on_bit_identically(tmp_path, base):
    straight, resumed = kill_and_resume(QLoRA, list, tmp_path, plugins=[precision(base=base)])
    assert differences(learned(straight), learned(resumed)) == []
    assert straight["NF4Precision"]
    assert differences(straight["NF4Precision"], resumed["NF4Precision"]) == []


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_killed_run_goes_on_bit_identically_from_other_first_weights(tmp_path, double_quant):
    plugin = precision(double_quant=double_quant)
    straight, resumed = kill_and_resume(ForeignLlama, list, tmp_path, plugins=[plugin])
    assert differences(learned(straight), learned(resumed)) == []


def test_a_checkpoint_loads_and_tests_without_the_plugin_to_the_same_function(tmp_path):
    module = ForeignLlama()
    run = fit(tmp_path, module, plugin=precision(base="32-true"))
    run.save_checkpoint(tmp_path / "end.ckpt")
    plain = ForeignLlama.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    assert list(plain.state_dict()) == list(ForeignLlama().state_dict())
    batch = next(iter(batches()))
    # Two ways to the same product: the codes' weights are equal bit for bit, sums may be made in another order.
    torch.testing.assert_close(plain.net(**batch).loss, module.net(**batch).loss, atol=1e-6, rtol=0)
    for name, layer in frozen_layers(module).items():
        assert torch.equal(plain.get_submodule(name).weight, layer.dequantized())
    alone = trainer(tmp_path).test(ForeignLlama(), batches(), tmp_path / "end.ckpt", verbose=False, weights_only=True)
    ours = run.test(module, batches(), verbose=False)
    assert alone[0]["test_loss"] == pytest.approx(ours[0]["test_loss"], abs=1e-6)


def test_evaluating_a_checkpoint_with_the_plugin_gives_the_run_s_own_figure_exactly(tmp_path):
    module = ForeignLlama()
    run = fit(tmp_path, module)
    run.save_checkpoint(tmp_path / "end.ckpt")
    own = run.validate(module, batches(), verbose=False)
    fresh = trainer(tmp_path, plugins=[precision()])
    assert fresh.validate(ForeignLlama(), batches(), tmp_path / "end.ckpt", verbose=False, weights_only=True) == own
    # and into layers that are frozen already
    assert fresh.validate(fresh.model, batches(), tmp_path / "end.ckpt", verbose=False, weights_only=True) == own


def test_statistics_of_other_blocks_are_left_alone(tmp_path):
    fit(tmp_path, ForeignLlama()).save_checkpoint(tmp_path / "end.ckpt")
    other = precision(block=64, targets="*down_proj")
    trainer(tmp_path, plugins=[other]).validate(
        ForeignLlama(), batches(), tmp_path / "end.ckpt", verbose=False, weights_only=True
    )
    assert all(layer.settings.block == 64 for layer in other._layers.values())
    assert len(other._layers) == 2


def test_an_optimizer_made_before_the_fit_trains_the_rest(tmp_path):
    class Eager(ForeignLlama):
        """As LightningCLI does it: of all parameters, at once."""

        def __init__(self):
            super().__init__()
            self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)

        def configure_optimizers(self):
            return self.optimizer

    module = Eager()
    norm, codes = module.net.model.norm.weight.detach().clone(), copy.deepcopy(module)
    nf4_(codes, block=32)
    fit(tmp_path, module)
    assert not torch.equal(module.net.model.norm.weight, norm)
    for name, layer in frozen_layers(codes).items():
        assert torch.equal(module.get_submodule(name).weight, layer.weight)


@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_it_distils_as_student_and_as_teacher(tmp_path, who):
    torch.manual_seed(0)
    teacher = ForeignLlama(hidden=64).net
    if who != "student":
        nf4_(teacher, block=32)
    plugins = [] if who == "teacher" else [precision()]
    module = ForeignLlama()
    run = trainer(tmp_path, [KnowledgeDistillation(teacher=teacher)], plugins=plugins)
    run.fit(module, batches())
    assert run.callback_metrics["slm/kd_loss"] > 0
    assert len(frozen_layers(module)) == (0 if who == "teacher" else 14)
    trained = [p for p in module.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_from_the_command_line_by_its_short_name(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["test"])
    cli = LightningCLI(
        ForeignLlama,
        trainer_defaults={"accelerator": "cpu", "logger": False, "default_root_dir": str(tmp_path)},
        args=["--trainer.plugins=NF4Precision", "--trainer.plugins.block=32", '--trainer.plugins.skip=["*down_proj"]'],
        run=False,
        seed_everything_default=0,
    )
    plugin = cli.trainer.precision_plugin
    assert (type(plugin), plugin.block, plugin.skip, plugin.double_quant) == (NF4Precision, 32, ["*down_proj"], True)


def test_averages_of_weights_pruning_and_rounding_of_the_same_layers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="EMAWeightAveraging averages all parameters"):
        fit(tmp_path, ForeignLlama(), EMAWeightAveraging())
    with pytest.raises(ValueError, match=r"q_proj.weight' holds packed torch.uint8; prune before quantising"):
        fit(tmp_path, ForeignLlama(), GradualPruning(0.5, end=0.5))
    with pytest.raises(ValueError, match="computes as FakeQuantLinear already, so it cannot become NF4Linear"):
        fit(tmp_path, ForeignLlama(), QuantizationAwareTraining("int4_weight"))


def test_a_model_without_a_fitting_layer_is_told(tmp_path):
    with pytest.warns(NoEffectWarning, match=r"rows of 32, which are not whole blocks of 4096"):
        fit(tmp_path, ForeignLlama(), plugin=NF4Precision(block=4096), steps=1)


def test_a_base_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="base='16-mixed' must be one of"):
        NF4Precision(base="16-mixed")


def test_lightning_s_own_plugin_for_bitsandbytes_does_not_run_on_a_cpu():
    """What this one is for, beside keys that load elsewhere."""
    from lightning.pytorch.plugins import BitsandbytesPrecision

    with pytest.raises(RuntimeError, match="only supported on CUDA"):
        Trainer(accelerator="cpu", plugins=[BitsandbytesPrecision("nf4-dq")], logger=False)
