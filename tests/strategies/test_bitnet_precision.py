"""BitNetPrecision in a Trainer: what it exchanges and when, its logs, and that a killed run goes on as it was."""

import sys
import textwrap
from functools import partial

import pytest
import support
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI
from support import (
    Demo,
    ForeignLlama,
    Killed,
    Notes,
    SaveAndDie,
    batches,
    checkpoint,
    differences,
    kill_and_resume,
    learned,
    run_on_ranks,
    trainer,
)
from torch import nn

from lightning_slm.export import save_hf_folder
from lightning_slm.quantization.bitnet import BitLinear, BitNet, bit_layers, bitnet_, quantize_bits
from lightning_slm.strategies.bitnet_precision import BitNetPrecision

MODULES = {"foreign": (ForeignLlama, batches), "demo": (partial(Demo, dropout=0.1), partial(batches, pairs=True))}
not_everything = pytest.mark.filterwarnings("ignore:Not quantised, for only the forward")  # the demo's in_proj_weight


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


def fit(folder, plugin=None, *callbacks, module=None, loader=batches, **kwargs):
    """A short run: its module and what it logged at each step."""
    torch.manual_seed(0)
    module, notes = module or ForeignLlama(), Notes()
    trainer(folder, callbacks, **{"logger": notes, "plugins": plugin, **kwargs}).fit(module, loader())
    return module, notes.steps


def with_a_plugin_each(monkeypatch, make_plugin):
    """Trainers of the test support get a plugin of their own, as three processes would."""
    plain = support.trainer
    monkeypatch.setattr(support, "trainer", lambda *args, **kw: plain(*args, plugins=[make_plugin()], **kw))


@not_everything
@pytest.mark.parametrize("options", [{}, {"bits": "1", "warmup": 0.8, "weight_decay_until": 0.7}], ids=str)
@pytest.mark.parametrize("kind", MODULES)
def test_a_killed_and_resumed_run_is_bit_identical_and_its_checkpoint_needs_nobody(
    tmp_path, monkeypatch, kind, options
):
    make, loader = MODULES[kind]
    with_a_plugin_each(monkeypatch, partial(BitNetPrecision, **options))
    straight, resumed = kill_and_resume(make, list, tmp_path, loader)
    assert differences(learned(straight), learned(resumed)) == []
    assert all({"slm/flip_rate", "slm/zero_fraction"} <= values.keys() for values in straight["notes"].values())
    plain = make()
    assert list(straight["state_dict"]) == list(plain.state_dict())
    assert {v.dtype for v in straight["state_dict"].values()} == {v.dtype for v in plain.state_dict().values()}
    loaded = type(plain).load_from_checkpoint(tmp_path / "end.ckpt")
    assert differences(dict(loaded.state_dict()), dict(straight["state_dict"])) == []


def test_resumed_as_a_longer_run_it_keeps_the_ramp_it_began_with(tmp_path):
    with pytest.raises(Killed):
        fit(tmp_path, BitNetPrecision(warmup=1.0), SaveAndDie(tmp_path / "saved.ckpt", 4), enable_checkpointing=True)
    watch, module = Watch(), ForeignLlama()
    longer = trainer(tmp_path, [watch], steps=12, plugins=BitNetPrecision(warmup=1.0))
    longer.fit(module, batches(), ckpt_path=tmp_path / "saved.ckpt")
    assert watch.steps == [4 / 8, 5 / 8, 6 / 8, 7 / 8, 1, 1, 1, 1]


def test_the_layers_are_bitnets_and_head_and_embedding_are_not(tmp_path):
    plugin = BitNetPrecision("1", skip="*k_proj", sub_norm=True)
    module, _ = fit(tmp_path, plugin)
    exchanged = {name: m for name, m in module.named_modules() if isinstance(m, BitLinear)}
    assert list(exchanged) == plugin.converted
    assert len(exchanged) == 2 * 6
    assert {m.settings for m in exchanged.values()} == {BitNet("1", sub_norm=True)}
    assert not any(name.endswith(("k_proj", "lm_head")) for name in exchanged)
    assert type(module.net.get_output_embeddings()) is nn.Linear
    assert plugin.multiplies is torch.int8


@pytest.mark.parametrize(
    ("base", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32)]
)
def test_a_run_is_that_of_a_module_whose_layers_were_exchanged_by_hand(tmp_path, base, dtype):
    module, logged = fit(tmp_path, BitNetPrecision(base=base))
    assert {p.dtype for p in module.parameters()} == {dtype}
    torch.manual_seed(0)
    by_hand = ForeignLlama()
    bitnet_(by_hand)
    by_hand, expected = fit(tmp_path, module=by_hand, precision=base)
    assert [values["train_loss"] for values in logged.values()] == [v["train_loss"] for v in expected.values()]
    assert differences(dict(by_hand.state_dict()), dict(module.state_dict())) == []


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


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str)
def test_it_goes_with_accumulation_and_clipping(tmp_path, options):
    module, logged = fit(tmp_path, BitNetPrecision(), **options)
    torch.manual_seed(0)
    by_hand = ForeignLlama()
    bitnet_(by_hand)
    by_hand, _ = fit(tmp_path, module=by_hand, precision="bf16-mixed", **options)
    assert differences(dict(by_hand.state_dict()), dict(module.state_dict())) == []
    assert len(logged) == 8


def parse(*options):
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false"]
    settings = {"run": False, "save_config_callback": None, "seed_everything_default": 0}
    return LightningCLI(ForeignLlama, args=[*options, *quiet], **settings)


@pytest.mark.parametrize("bits", ["1.58", "1"])
def test_the_command_line_knows_its_short_name_and_bits_that_look_like_numbers(tmp_path, monkeypatch, bits):
    monkeypatch.setattr(sys, "argv", ["lightning"])
    cli = parse(
        "--trainer.plugins=BitNetPrecision",
        f"--trainer.plugins.bits={bits}",
        "--trainer.plugins.warmup=0.1",
        f"--trainer.default_root_dir={tmp_path}",
    )
    plugin = cli.trainer.precision_plugin
    assert type(plugin) is BitNetPrecision
    assert (plugin.bits, plugin.warmup, plugin.base) == (bits, 0.1, "bf16-mixed")
    (tmp_path / "dumped.yaml").write_text(cli.parser.dump(cli.config, skip_none=False))
    again = parse(f"--config={tmp_path / 'dumped.yaml'}").trainer.precision_plugin
    assert vars(again) == vars(plugin)


def test_the_recipe_is_an_overlay_with_the_papers_weight_decay(tmp_path, monkeypatch):
    from lightning_slm._cli.packaged import FOLDER

    monkeypatch.setattr(sys, "argv", ["lightning"])
    overlay = yaml.safe_load((FOLDER / "bitnet.yaml").read_text())
    (plugin,) = overlay["trainer"]["plugins+"]
    assert plugin["class_path"] == "lightning_slm.BitNetPrecision"
    plugin["class_path"] = "BitNetPrecision"
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    made = parse(f"--config={tmp_path / 'overlay.yaml'}", f"--trainer.default_root_dir={tmp_path}")
    assert (made.trainer.precision_plugin.bits, made.trainer.precision_plugin.weight_decay_until) == ("1.58", 0.5)


def test_what_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"bits='2' must be a string, '1\.58' or '1'"):
        BitNetPrecision("2")
    with pytest.raises(ValueError, match=r"warmup=1.5 and weight_decay_until=1.0 are fractions"):
        BitNetPrecision(warmup=1.5)
    with pytest.raises(ValueError, match="neither max_steps nor max_epochs"):
        fit(tmp_path, BitNetPrecision(warmup=0.5), steps=-1, max_epochs=-1, max_time="00:00:00:05")


ON_TWO_RANKS = """
    import sys, warnings
    from pathlib import Path
    warnings.simplefilter("ignore")
    import torch
    torch.set_num_threads(1)
    from support import ForeignLlama, Notes, batches, trainer
    from lightning_slm.strategies.bitnet_precision import BitNetPrecision
    from lightning_slm.strategies.fsdp2_strategy import FSDP2Strategy

    for name, strategy in (("ddp", "ddp"), ("fsdp2", FSDP2Strategy())):
        torch.manual_seed(0)
        module, notes = ForeignLlama(), Notes()
        settings = {"plugins": [BitNetPrecision(base="32-true", warmup=0.5, weight_decay_until=0.5)], "devices": 2}
        run = trainer(Path(sys.argv[1]), strategy=strategy, logger=notes, **settings)
        run.fit(module, batches())
        if run.global_rank == 0:
            for key in ("train_loss", "slm/flip_rate", "slm/zero_fraction"):
                print("LOGGED", name, key, *(values[key] for values in notes.steps.values()))
"""


@pytest.mark.slow
def test_sharded_weights_learn_what_whole_ones_do_and_their_codes_are_counted_alike(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(ON_TWO_RANKS))
    lines = [line.split() for line in run_on_ranks(script, tmp_path, timeout=120).splitlines() if "LOGGED" in line]
    logged = {(name, key): list(map(float, values)) for _, name, key, *values in lines}
    assert len(logged) == 6
    for key, tolerance in {"train_loss": 1e-3, "slm/flip_rate": 0.05, "slm/zero_fraction": 0.01}.items():
        assert len(logged["ddp", key]) == 8
        assert logged["fsdp2", key] == pytest.approx(logged["ddp", key], rel=tolerance)
