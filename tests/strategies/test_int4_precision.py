"""Int4Precision in a Trainer: what it exchanges, what it leaves, and that a killed run goes on as it was."""

import sys
import textwrap
from functools import partial

import pytest
import support
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from support import (
    WINDOW,
    Demo,
    ForeignLlama,
    Notes,
    batches,
    differences,
    kill_and_resume,
    learned,
    run_on_ranks,
    trainer,
)
from torch import nn

from lightning_slm._cli import packaged
from lightning_slm.callbacks import GradualPruning, KnowledgeDistillation, QuantizationAwareTraining
from lightning_slm.quantization.int4 import Int4, Int4Linear, int4_
from lightning_slm.strategies.int4_precision import Int4Precision

SAMPLED = [True, False]
MODULES = {"foreign": (ForeignLlama, batches), "demo": (partial(Demo, dropout=0.1), partial(batches, pairs=True))}
not_everything = pytest.mark.filterwarnings("ignore:Not quantised, for only the forward")  # the demo's in_proj_weight


def fit(folder, module=None, loader=batches, **kwargs):
    """A short run: its module and its training losses."""
    torch.manual_seed(0)
    module, notes = module or ForeignLlama(), Notes()
    torch.manual_seed(1)  # gradients are rounded by chance
    trainer(folder, logger=notes, **kwargs).fit(module, loader())
    return module, [values["train_loss"] for values in notes.steps.values() if "train_loss" in values]


def few_words():
    """Twenty batches of random tokens, of which there are a dozen: that much can be learned of them in twenty steps."""
    ids = torch.randint(12, (160, WINDOW), generator=torch.Generator().manual_seed(7))
    return torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=8)


def with_a_plugin_each(monkeypatch, make_plugin):
    """Trainers of the test support get a plugin of their own, as three processes would."""
    plain = support.trainer
    monkeypatch.setattr(support, "trainer", lambda *args, **kw: plain(*args, plugins=[make_plugin()], **kw))


@not_everything
@pytest.mark.parametrize("sampled", SAMPLED)
@pytest.mark.parametrize("kind", MODULES)
def test_a_killed_and_resumed_run_is_bit_identical_and_its_checkpoint_needs_nobody(
    tmp_path, monkeypatch, kind, sampled
):
    make, loader = MODULES[kind]
    with_a_plugin_each(monkeypatch, partial(Int4Precision, sampled=sampled))
    straight, resumed = kill_and_resume(make, list, tmp_path, loader)
    assert differences(learned(straight), learned(resumed)) == []
    assert straight["notes"]
    plain = make()
    assert list(straight["state_dict"]) == list(plain.state_dict())
    assert {v.dtype for v in straight["state_dict"].values()} == {v.dtype for v in plain.state_dict().values()}
    loaded = type(plain).load_from_checkpoint(tmp_path / "end.ckpt")
    assert differences(dict(loaded.state_dict()), dict(straight["state_dict"])) == []


def test_the_layers_multiply_int4_and_head_and_embedding_do_not(tmp_path):
    plugin = Int4Precision(skip="*k_proj")
    module, _ = fit(tmp_path, plugins=[plugin])
    exchanged = {name: m for name, m in module.named_modules() if isinstance(m, Int4Linear)}
    assert list(exchanged) == plugin.converted
    assert len(exchanged) == 2 * 6
    assert {m.settings for m in exchanged.values()} == {Int4(sampled=True)}
    assert not any(name.endswith(("k_proj", "lm_head")) for name in exchanged)
    assert type(module.net.get_output_embeddings()) is nn.Linear
    assert plugin.multiplies is torch.int8


@pytest.mark.parametrize(("base", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16)])
def test_what_is_left_computes_in_the_base(tmp_path, base, dtype):
    """A run with the plugin is, bit for bit, the run of a module whose layers were exchanged by hand."""
    module, losses = fit(tmp_path, plugins=[Int4Precision(base=base)])
    assert {p.dtype for p in module.parameters()} == {dtype}
    torch.manual_seed(0)
    by_hand = ForeignLlama()
    int4_(by_hand)
    by_hand, expected = fit(tmp_path, by_hand, precision=base)
    assert losses == expected
    assert differences(dict(by_hand.state_dict()), dict(module.state_dict())) == []


@pytest.mark.parametrize("sampled", SAMPLED)
def test_twenty_steps_learn_within_fifteen_percent_of_bf16(tmp_path, sampled):
    twenty = {"loader": few_words, "steps": 20}
    _, losses = fit(tmp_path, plugins=[Int4Precision(sampled=sampled)], **twenty)
    _, plain = fit(tmp_path, precision="bf16-mixed", **twenty)
    assert len(plain) == 20
    assert plain[-1] < 0.7 * plain[0]
    assert losses == pytest.approx(plain, rel=0.15)
    assert losses != plain


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str)
def test_it_goes_with_accumulation_and_clipping(tmp_path, options):
    _, losses = fit(tmp_path, plugins=[Int4Precision()], **options)
    _, plain = fit(tmp_path, precision="bf16-mixed", **options)
    assert losses == pytest.approx(plain, rel=0.15)


def test_it_goes_with_pruning_and_distillation(tmp_path):
    callbacks = [KnowledgeDistillation(ForeignLlama().net), GradualPruning(0.5, group=4, end=0.75, every=2)]
    module = ForeignLlama()
    trainer(tmp_path, callbacks, plugins=[Int4Precision()]).fit(module, batches())
    weights = [m.weight for m in module.modules() if isinstance(m, Int4Linear)]
    assert len(weights) == 2 * 7
    assert all(((w.reshape(-1, 4) == 0).sum(1) == 2).all() for w in weights)


def test_a_layer_that_is_rounded_for_export_is_refused(tmp_path):
    run = trainer(tmp_path, [QuantizationAwareTraining()], plugins=[Int4Precision()])
    with pytest.raises(ValueError, match="computes as FakeQuantLinear already, so it cannot become Int4Linear"):
        run.fit(ForeignLlama(), batches())


def test_the_overlay_asks_for_this_plugin():
    (asked,) = yaml.safe_load((packaged.FOLDER / "int4.yaml").read_text())["trainer"]["plugins+"]
    assert asked["class_path"] == "lightning_slm.Int4Precision"
    assert vars(Int4Precision(**asked["init_args"])) == vars(Int4Precision())


def test_the_command_line_knows_its_short_name(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning"])
    options = ["--trainer.plugins=Int4Precision", "--trainer.plugins.sampled=false", "--trainer.plugins.skip=*k_proj"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    cli = LightningCLI(
        ForeignLlama, args=[*options, *quiet], run=False, save_config_callback=None, seed_everything_default=0
    )
    plugin = cli.trainer.precision_plugin
    assert type(plugin) is Int4Precision
    assert (plugin.sampled, plugin.skip, plugin.base) == (False, "*k_proj", "bf16-mixed")


def test_an_unknown_base_is_refused_at_once():
    with pytest.raises(ValueError, match="base='16-mixed' must be one of '32-true'"):
        Int4Precision(base="16-mixed")


ON_TWO_RANKS = """
    import sys, warnings
    from pathlib import Path
    warnings.simplefilter("ignore")
    import torch
    torch.set_num_threads(1)
    from support import ForeignLlama, Notes, batches, trainer
    from lightning_slm.strategies.int4_precision import Int4Precision
    from lightning_slm.strategies.fsdp2_strategy import FSDP2Strategy

    for name, strategy in (("ddp", "ddp"), ("fsdp2", FSDP2Strategy())):
        torch.manual_seed(0)
        module, notes = ForeignLlama(), Notes()
        torch.manual_seed(1)
        settings = {"plugins": [Int4Precision(sampled=True)], "devices": 2}
        run = trainer(Path(sys.argv[1]), strategy=strategy, logger=notes, **settings)
        run.fit(module, batches())
        losses = [values["train_loss"] for values in notes.steps.values() if "train_loss" in values]
        if run.global_rank == 0:
            print("LOSSES", name, *losses)
"""


@pytest.mark.slow
def test_sharded_weights_learn_what_whole_ones_do(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(ON_TWO_RANKS))
    lines = [line.split() for line in run_on_ranks(script, tmp_path, timeout=120).splitlines() if "LOSSES" in line]
    (_, _, *whole), (_, _, *sharded) = lines
    assert len(whole) == 8
    assert [float(loss) for loss in sharded] == pytest.approx([float(loss) for loss in whole], rel=1e-4)
