"""BitNetPrecision: how its rounding and weight decay follow the steps, its logs, its export.

What it shares with all stands in test_precision_contract.py.
"""

import pytest
import torch
from lightning.pytorch import Callback
from support import ForeignLlama, Killed, Notes, SaveAndDie, batches, checkpoint, trainer

from lightning_slm.export import save_hf_folder
from lightning_slm.quantization.bitnet import BitNet, bit_layers, quantize_bits
from lightning_slm.strategies.bitnet_precision import BitNetPrecision


class Watch(Callback):
    """How much of the rounding each step and each validation felt, and the weight decay of each step."""

    def __init__(self):
        self.steps, self.validations, self.decays = [], [], []

    @staticmethod
    def share(module):
        (share,) = {1.0 if m.share is None else float(m.share) for _, m in bit_layers(module)}
        return share

    def on_before_backward(self, trainer, pl_module, loss):
        self.steps.append(self.share(pl_module))

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.validations.append(self.share(pl_module))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.decays.append(optimizer.param_groups[0]["weight_decay"])


def fit(folder, plugin=None, *callbacks, module=None, **kwargs):
    """A short run: its module and what it logged at each step."""
    torch.manual_seed(0)
    module, notes = module or ForeignLlama(), Notes()
    trainer(folder, callbacks, **{"logger": notes, "plugins": plugin, **kwargs}).fit(module, batches())
    return module, notes.steps


def test_resumed_as_a_longer_run_it_keeps_the_ramp_it_began_with(tmp_path):
    with pytest.raises(Killed):
        fit(tmp_path, BitNetPrecision(warmup=1.0), SaveAndDie(tmp_path / "saved.ckpt", 4), enable_checkpointing=True)
    watch, module = Watch(), ForeignLlama()
    longer = trainer(tmp_path, [watch], steps=12, plugins=BitNetPrecision(warmup=1.0))
    longer.fit(module, batches(), ckpt_path=tmp_path / "saved.ckpt")
    assert watch.steps == [4 / 8, 5 / 8, 6 / 8, 7 / 8, 1, 1, 1, 1]


def test_its_settings_are_those_of_the_layers():
    plugin = BitNetPrecision("1", sub_norm=True)
    module = plugin.convert_module(ForeignLlama())
    assert {m.settings for _, m in bit_layers(module)} == {BitNet("1", sub_norm=True)}
    assert plugin.multiplies is torch.int8


def test_the_rounding_grows_with_the_optimizer_steps_and_is_whole_for_whoever_only_evaluates(tmp_path):
    watch, plugin = Watch(), BitNetPrecision(warmup=0.5)
    run = trainer(tmp_path, [watch], plugins=plugin, accumulate_grad_batches=2, val_check_interval=4)
    module = ForeignLlama()
    run.fit(module, batches(), batches(n=2))
    assert watch.steps == [min(step / 4, 1.0) for step in range(8) for _ in range(2)]
    assert watch.validations[:3] == [0.0, 0.5, 1.0], "before the first step, and after 2 and 4"
    assert Watch.share(module) == 1.0
    alone = Watch()
    trainer(tmp_path, [alone], plugins=BitNetPrecision(warmup=0.5)).validate(module, batches(n=2), verbose=False)
    assert alone.validations == [1.0]


def test_an_interrupted_warm_up_leaves_layers_that_round_altogether(tmp_path):
    torch.manual_seed(0)
    module, watch = ForeignLlama(), Watch()
    death = SaveAndDie(tmp_path / "saved.ckpt", 3)
    with pytest.raises(Killed):
        fit(tmp_path, BitNetPrecision(warmup=1.0), watch, death, module=module, enable_checkpointing=True)
    assert watch.steps[-1] < 1
    assert Watch.share(module) == 1.0


def test_weight_decay_ends_at_its_fraction_of_the_run_and_stays_without_by_default(tmp_path):
    ending, always = Watch(), Watch()
    fit(tmp_path, BitNetPrecision(weight_decay_until=0.5), ending)
    fit(tmp_path, BitNetPrecision(), always)
    assert ending.decays == [0.01] * 4 + [0.0] * 4
    assert always.decays == [0.01] * 8


class Codes(Callback):
    """All codes, after each step."""

    def __init__(self):
        self.after = []

    def look(self, pl_module):
        layers = [quantize_bits(m.weight, "1.58")[0].flatten() for _, m in bit_layers(pl_module)]
        self.after.append(torch.cat(layers))

    def on_train_start(self, trainer, pl_module):
        self.look(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.look(pl_module)


def test_flips_and_zeros_are_logged_as_they_are_counted_by_hand_and_only_where_a_step_is_logged(tmp_path, monkeypatch):
    codes, looks = Codes(), []
    original = BitNetPrecision._codes
    monkeypatch.setattr(BitNetPrecision, "_codes", lambda self: looks.append(1) or original(self))
    _, logged = fit(tmp_path, BitNetPrecision(), codes, log_every_n_steps=4)
    assert [step for step, values in logged.items() if "slm/flip_rate" in values] == [3, 7]
    assert len(looks) == 4, "before and after two of the eight steps"
    for step in (3, 7):
        before, after = codes.after[step], codes.after[step + 1]
        assert logged[step]["slm/flip_rate"] == pytest.approx((before != after).float().mean().item())
        assert logged[step]["slm/zero_fraction"] == pytest.approx((after == 0).float().mean().item())
        assert 0 < logged[step]["slm/flip_rate"] < logged[step]["slm/zero_fraction"] < 0.5


def test_what_was_trained_is_exported_with_the_codes_of_its_checkpoint(tmp_path):
    torch.manual_seed(0)
    module, run = ForeignLlama(), trainer(tmp_path, plugins=BitNetPrecision())
    run.fit(module, batches())
    saved = checkpoint(run)["state_dict"]
    done = save_hf_folder(module.net, tmp_path / "out")
    assert done.quantized
    assert done.difference == 0.0
    for name, layer in bit_layers(module):
        assert torch.equal(layer.weight, saved[f"{name}.weight"])


def test_what_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"bits='2' must be a string, '1\.58' or '1'"):
        BitNetPrecision("2")
    with pytest.raises(ValueError, match=r"warmup=1.5 and weight_decay_until=1.0 are fractions"):
        BitNetPrecision(warmup=1.5)
    with pytest.raises(ValueError, match="neither max_steps nor max_epochs"):
        fit(tmp_path, BitNetPrecision(warmup=0.5), steps=-1, max_epochs=-1, max_time="00:00:00:05")
