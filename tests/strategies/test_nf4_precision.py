"""NF4Precision, and what it shares with LLMInt8Precision: what trains, checkpoints without them, whom they refuse.

What they share with all stands in test_precision_contract.py.
"""

import copy
from functools import partial

import peft
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from support import ForeignLlama, Notes, batches, differences, kill_and_resume, learned, tiny_llama, trainer

from lightning_slm.callbacks import KnowledgeDistillation
from lightning_slm.errors import NoEffectWarning
from lightning_slm.quantization.bnb import frozen_layers, llm_int8_, nf4_
from lightning_slm.strategies.llm_int8_precision import LLMInt8Precision
from lightning_slm.strategies.nf4_precision import NF4Precision

# peft 0.21.2 asks for it by that name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


FROZEN = {
    "NF4": (partial(NF4Precision, block=32), partial(nf4_, block=32)),
    "LLM.int8": (LLMInt8Precision, llm_int8_),
}
both = pytest.mark.parametrize("kind", FROZEN)
precision = FROZEN["NF4"][0]


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
    run.fit(module, batches(), batches(n=4))
    return run


@both
@pytest.mark.parametrize("base", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_loss_falls_while_the_codes_and_what_they_are_multiplied_by_stay(tmp_path, kind, base):
    make, by_hand_ = FROZEN[kind]
    module = ForeignLlama()
    plugin, before = make(base=base), copy.deepcopy(module)
    by_hand_(before)
    losses = [float(fit(tmp_path, module, plugin=plugin, steps=n).callback_metrics["train_loss"]) for n in (1, 40)]
    assert losses[1] < losses[0] - 0.5
    assert plugin.converted == list(frozen_layers(before))
    assert len(plugin.converted) == 14
    for name, layer in frozen_layers(before).items():
        now = module.get_submodule(name)
        assert torch.equal(now.weight, layer.weight)
        assert differences(now.statistics(), layer.statistics()) == []
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    codes = {f"{name}.weight" for name in plugin.converted}
    assert trained == {name for name, _ in ForeignLlama().named_parameters()} - codes


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


@both
def test_a_checkpoint_holds_the_plain_weights_that_the_codes_stand_for(tmp_path, kind):
    module = ForeignLlama()
    fit(tmp_path, module, plugin=FROZEN[kind][0]()).save_checkpoint(tmp_path / "end.ckpt")
    plain = ForeignLlama.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    assert list(plain.state_dict()) == list(ForeignLlama().state_dict())
    for name, layer in frozen_layers(module).items():
        assert torch.equal(plain.get_submodule(name).weight, layer.dequantized())


def test_a_checkpoint_tests_without_the_plugin_to_the_same_function(tmp_path):
    """Two ways to the same product: the codes' weights are equal bit for bit, sums may be made in another order."""
    module = ForeignLlama()
    run = fit(tmp_path, module, plugin=precision(base="32-true"))
    run.save_checkpoint(tmp_path / "end.ckpt")
    plain = ForeignLlama.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    batch = next(iter(batches()))
    torch.testing.assert_close(plain.net(**batch).loss, module.net(**batch).loss, atol=1e-6, rtol=0)
    alone = trainer(tmp_path).test(ForeignLlama(), batches(), tmp_path / "end.ckpt", verbose=False, weights_only=True)
    ours = run.test(module, batches(), verbose=False)
    assert alone[0]["test_loss"] == pytest.approx(ours[0]["test_loss"], abs=1e-6)


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


@both
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_it_distils_as_student_and_as_teacher(tmp_path, kind, who):
    make, by_hand_ = FROZEN[kind]
    teacher = ForeignLlama(hidden=64).net
    if who != "student":
        by_hand_(teacher)
    plugins = [] if who == "teacher" else [make()]
    module = ForeignLlama()
    run = trainer(tmp_path, [KnowledgeDistillation(teacher=teacher)], plugins=plugins)
    run.fit(module, batches())
    assert run.callback_metrics["slm/kd_loss"] > 0
    assert len(frozen_layers(module)) == (0 if who == "teacher" else 14)
    trained = [p for p in module.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_its_settings_are_those_of_the_layers():
    plugin = NF4Precision(double_quant=False, block=32)
    module = plugin.convert_module(ForeignLlama())
    found = {(layer.settings.block, layer.settings.double_quant) for layer in frozen_layers(module).values()}
    assert found == {(32, False)}
    assert plugin.multiplies is torch.bfloat16


@both
def test_averages_of_weights_are_refused(tmp_path, kind):
    with pytest.raises(ValueError, match="EMAWeightAveraging averages all parameters"):
        fit(tmp_path, ForeignLlama(), EMAWeightAveraging(), plugin=FROZEN[kind][0]())


def test_a_model_without_a_fitting_layer_is_told(tmp_path):
    with pytest.warns(NoEffectWarning, match=r"rows of 32, which are not whole blocks of 4096"):
        fit(tmp_path, ForeignLlama(), plugin=NF4Precision(block=4096), steps=1)


def test_lightning_s_own_plugin_for_bitsandbytes_does_not_run_on_a_cpu():
    """What this one is for, beside keys that load elsewhere."""
    from lightning.pytorch.plugins import BitsandbytesPrecision

    with pytest.raises(RuntimeError, match="only supported on CUDA"):
        Trainer(accelerator="cpu", plugins=[BitsandbytesPrecision("nf4-dq")], logger=False)
