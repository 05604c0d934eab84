"""Float8Precision in a Trainer, and its weights gathered as FP8 by two processes."""

import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from support import Demo, ForeignLlama, Notes, batches, differences, kill_and_resume, learned, trainer
from torch import nn

from lightning_slm._cli import packaged
from lightning_slm.errors import NoEffectWarning
from lightning_slm.quantization.float8 import RECIPES, Float8Linear, float8_
from lightning_slm.strategies.float8_precision import Float8Precision, Recipe

MODULES = {"foreign": (ForeignLlama, batches), "demo": (partial(Demo, dropout=0.1), partial(batches, pairs=True))}
not_everything = pytest.mark.filterwarnings("ignore:Not quantised, for only the forward")  # the demo's in_proj_weight


def fit(folder, plugin=None, kind="foreign", **kwargs):
    """A short run: its module, its trainer, its training losses."""
    torch.manual_seed(0)
    make, loader = MODULES[kind]
    module, notes = make(), Notes()
    run = trainer(folder, logger=notes, **({"plugins": [plugin]} if plugin else {}), **kwargs)
    run.fit(module, loader(), loader(n=4))
    return module, run, [values["train_loss"] for values in notes.steps.values() if "train_loss" in values]


@not_everything
@pytest.mark.parametrize(("kind", "recipe"), [("demo", "tensorwise"), *(("foreign", r) for r in get_args(Recipe))])
def test_a_killed_and_resumed_run_is_bit_identical_and_its_checkpoint_needs_nobody(tmp_path, kind, recipe):
    make, loader = MODULES[kind]
    plugins = [Float8Precision(recipe, emulate=True)]
    straight, resumed = kill_and_resume(make, list, tmp_path, loader, plugins=plugins)
    assert differences(learned(straight), learned(resumed)) == []
    assert straight["notes"]
    plain = make()
    assert list(straight["state_dict"]) == list(plain.state_dict())
    assert {v.dtype for v in straight["state_dict"].values()} == {v.dtype for v in plain.state_dict().values()}
    loaded = type(plain).load_from_checkpoint(tmp_path / "end.ckpt")
    assert differences(dict(loaded.state_dict()), dict(straight["state_dict"])) == []


def test_the_layers_multiply_fp8_and_head_and_embedding_do_not(tmp_path):
    plugin = Float8Precision(emulate=True, skip="*k_proj")
    module, _, _ = fit(tmp_path, plugin)
    exchanged = [name for name, m in module.named_modules() if isinstance(m, Float8Linear)]
    assert exchanged == plugin.converted
    assert len(exchanged) == 2 * 6
    assert not any(name.endswith(("k_proj", "lm_head")) for name in exchanged)
    assert plugin.multiplies is torch.float8_e4m3fn


@pytest.mark.parametrize(("base", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16)])
def test_what_is_left_computes_in_the_base(tmp_path, base, dtype):
    """A run with the plugin is, bit for bit, the run of a module whose layers were exchanged by hand."""
    module, _, losses = fit(tmp_path, Float8Precision(emulate=True, base=base))
    assert {p.dtype for p in module.parameters()} == {dtype}
    torch.manual_seed(0)
    by_hand, notes = ForeignLlama(), Notes()
    float8_(by_hand, emulate=True)
    run = trainer(tmp_path, logger=notes, precision=base)
    run.fit(by_hand, batches(), batches(n=4))
    assert losses == [values["train_loss"] for values in notes.steps.values() if "train_loss" in values]
    assert differences(dict(by_hand.state_dict()), dict(module.state_dict())) == []


@pytest.mark.parametrize("recipe", get_args(Recipe))
def test_the_losses_are_those_of_bf16_within_five_percent(tmp_path, recipe):
    """Twenty steps in a Trainer."""
    *_, fp8 = fit(tmp_path, Float8Precision(recipe, emulate=True), max_steps=20, max_epochs=2)
    *_, bf16 = fit(tmp_path, precision="bf16-mixed", max_steps=20, max_epochs=2)
    assert len(fp8) == 20
    assert fp8 == pytest.approx(bf16, rel=0.05)
    assert fp8 != bf16


def test_layers_that_are_born_in_configure_model_are_exchanged_too(tmp_path):
    class Late(ForeignLlama):
        def configure_model(self):
            if not hasattr(self, "late"):
                self.late = nn.Linear(32, 32)

    plugin, module = Float8Precision(emulate=True), Late()
    trainer(tmp_path, plugins=[plugin]).fit(module, batches())
    assert type(module.late) is Float8Linear
    assert "late" in plugin.converted


def test_where_the_hardware_cannot_it_says_so_before_training(tmp_path):
    with pytest.raises(RuntimeError, match="emulate=True computes with the same rounding"):
        trainer(tmp_path, plugins=[Float8Precision()]).fit(ForeignLlama(), batches())


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"recipe='row' is unknown. Near names: 'rowwise'"):
        Float8Precision("row")
    with pytest.raises(ValueError, match="base='16-mixed' must be one of"):
        Float8Precision(base="16-mixed")
    with pytest.raises(ValueError, match="fp8_all_gather=True needs one scale per weight"):
        Float8Precision("rowwise", fp8_all_gather=True)


def test_fsdp1_is_refused_with_the_way_out():
    class FSDPStrategy:
        root_device = torch.device("cpu")

    module = nn.ModuleList([nn.Linear(16, 16)])
    module._trainer = type("Trainer", (), {"strategy": FSDPStrategy()})()
    with pytest.raises(ValueError, match="does not work with FSDPStrategy"):
        Float8Precision(emulate=True).convert_module(module)


def test_gathering_as_fp8_has_no_effect_where_nothing_is_gathered(tmp_path):
    run = trainer(tmp_path, plugins=[Float8Precision(emulate=True, fp8_all_gather=True)])
    with pytest.warns(NoEffectWarning, match=r"fp8_all_gather=True has no effect.*slm_fsdp2"):
        run.fit(ForeignLlama(), batches())


def test_the_recipes_are_torchaos():
    assert sorted(get_args(Recipe)) == sorted(RECIPES)


def test_the_command_line_knows_it_by_its_short_name(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning"])
    settings = {"run": False, "save_config_callback": None, "seed_everything_default": 0}
    short = ["--trainer.plugins=Float8Precision", "--trainer.plugins.recipe=rowwise", "--trainer.plugins.emulate=true"]
    first = LightningCLI(ForeignLlama, args=[*short, "--trainer.logger=false"], **settings)
    (tmp_path / "dumped.yaml").write_text(first.parser.dump(first.config, skip_none=False))
    second = LightningCLI(ForeignLlama, args=[f"--config={tmp_path / 'dumped.yaml'}"], **settings)
    for cli in (first, second):
        plugin = cli.trainer.precision_plugin
        assert type(plugin) is Float8Precision
        assert (plugin.recipe, plugin.emulate, plugin.base) == ("rowwise", True, "bf16-mixed")


def test_the_overlay_asks_for_this_plugin():
    (asked,) = yaml.safe_load((packaged.FOLDER / "float8.yaml").read_text())["trainer"]["plugins+"]
    assert asked["class_path"].endswith(".Float8Precision")
    plugin = Float8Precision(**asked["init_args"])
    assert isinstance(Trainer(plugins=plugin, logger=False, enable_checkpointing=False).precision_plugin, type(plugin))


ON_TWO_RANKS = """
    import os, sys, warnings
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    warnings.simplefilter("ignore")
    import torch
    torch.set_num_threads(1)
    from support import ForeignLlama, batches, differences, kill_and_resume, learned, trainer
    from lightning_slm.models import SLMConfig, SLMForCausalLM
    from lightning_slm.quantization.float8 import gathers_float8
    from lightning_slm.strategies.float8_precision import Float8Precision
    from lightning_slm.strategies.fsdp2_strategy import FSDP2Strategy

    folder, results = Path(sys.argv[1]), {{}}
    RANK = int(os.environ.get("LOCAL_RANK", 0))  # of the second process, which Lightning starts

    class Smooth(ForeignLlama):
        def __init__(self):
            super().__init__()
            sizes = {{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}}
            self.net = SLMForCausalLM(SLMConfig(**sizes, pattern="attn/smooth_mlp*2"))

    def pair(gather, base="32-true", **kwargs):
        plugin = Float8Precision(emulate=True, base=base, fp8_all_gather=gather)
        settings = {{"plugins": [plugin], "devices": 2, "use_distributed_sampler": False}}
        return {{**settings, "strategy": FSDP2Strategy(**kwargs) if kwargs else "slm_fsdp2"}}

    def loader(**kwargs):
        return batches(part=slice(RANK, None, 2), **kwargs)

    def fit(gather, make=ForeignLlama, **kwargs):
        torch.manual_seed(RANK)  # the weights of the first process count
        module, run = make(), trainer(folder, **pair(gather, **kwargs))
        run.fit(module, loader(), loader(n=4))
        return module, run

    def saved(run):
        run.save_checkpoint(folder / "full.ckpt")
        return torch.load(folder / "full.ckpt", weights_only=True)["state_dict"]

    (_, plain), (module, run) = (fit(gather, Smooth) for gather in (False, True))
    results["smooth"] = differences(saved(plain), saved(run))
    results["gathered though smooth"] = [name for name, m in module.named_modules() if gathers_float8(m)]

    for base in ("32-true", "bf16-mixed"):
        (_, plain), (module, run) = (fit(gather, base=base) for gather in (False, True))
        results["as FP8 or not", base] = differences(saved(plain), saved(run))
    for part in (plain.lightning_module, module):  # as a checkpoint, or an average of the weights, would
        with torch.no_grad():
            for p in part.parameters():
                p.mul_(3)
    outside = [r.validate(r.lightning_module, loader(n=4), verbose=False)[0]["val_loss"] for r in (plain, run)]
    results["weights written from outside"] = outside
    results["gathered"] = [name for name, m in module.named_modules() if gathers_float8(m)]
    results["converted"] = run.precision_plugin.converted

    straight, resumed = kill_and_resume(ForeignLlama, list, folder, loader, **pair(True))
    results["resumed"] = differences(learned(straight), learned(resumed))

    module, run = fit(True, save_distributed_checkpoint=True)
    run.save_checkpoint(folder / "shards")
    results["shards"] = {{key: value.full_tensor() for key, value in module.state_dict().items()}}
    torch.save(results, folder / f"results.{{RANK}}.pt")
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """One job of two processes for all the tests below."""
    folder = tmp_path_factory.mktemp("ranks")
    script, log = folder / "ranks.py", folder / "log.txt"
    script.write_text(textwrap.dedent(ON_TWO_RANKS).format(tests=str(Path(__file__).resolve().parents[1])))
    with log.open("w") as out:
        job, environment = [sys.executable, str(script), str(folder)], {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(job, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        assert process.wait(timeout=240) == 0, log.read_text()[-4000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # both ranks
    return folder, torch.load(folder / "results.0.pt")


@pytest.mark.slow
@pytest.mark.parametrize("base", ["32-true", "bf16-mixed"])
def test_weights_gathered_as_fp8_train_the_same_model_bit_for_bit(two_ranks, base):
    _, found = two_ranks
    assert found["as FP8 or not", base] == []
    assert found["gathered"] == found["converted"]


@pytest.mark.slow
def test_weights_that_someone_wrote_between_the_steps_are_rounded_by_scales_of_their_own(two_ranks):
    _, found = two_ranks
    plain, gathered = found["weights written from outside"]
    assert gathered == plain


@pytest.mark.slow
def test_weights_that_are_smoothed_first_are_gathered_as_they_are(two_ranks):
    _, found = two_ranks
    assert found["smooth"] == []
    assert len(found["gathered though smooth"]) == 2 * 3
    assert not any("down_proj" in name for name in found["gathered though smooth"])


@pytest.mark.slow
def test_gathering_as_fp8_a_killed_and_resumed_run_is_bit_identical(two_ranks):
    _, found = two_ranks
    assert found["resumed"] == []


@pytest.mark.slow
def test_checkpoints_of_weights_gathered_as_fp8_load_without_torchao(two_ranks):
    """One file, and a folder of shards, in a process that has never heard of torchao."""
    folder, found = two_ranks
    torch.save(found["shards"], folder / "expected.pt")
    script = (
        "import sys, torch\nimport torch.distributed.checkpoint as dcp\n"
        f"full = torch.load({str(folder / 'full.ckpt')!r}, weights_only=True)['state_dict']\n"
        f"expected = torch.load({str(folder / 'expected.pt')!r}, weights_only=True)\n"
        "assert {type(v) for v in full.values()} == {torch.Tensor} and full.keys() == expected.keys()\n"
        "state = {'state_dict': {key: torch.zeros_like(value) for key, value in full.items()}}\n"
        f"dcp.load(state, checkpoint_id={str(folder / 'shards')!r}, no_dist=True)\n"
        "assert all(torch.equal(value, expected[key]) for key, value in state['state_dict'].items())\n"
        "assert 'torchao' not in sys.modules and 'lightning_slm' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
