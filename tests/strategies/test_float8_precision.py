"""Float8Precision: what is its own, and its weights gathered as FP8 by two processes.

The rest stands in test_precision_contract.py, for all.
"""

import subprocess
import sys
import textwrap
from typing import get_args

import pytest
import torch
from support import ForeignLlama, batches, run_on_ranks, trainer

from lightning_slm.errors import NoEffectWarning
from lightning_slm.quantization.float8 import RECIPES, Float8Linear, Float8Settings
from lightning_slm.strategies.float8_precision import Float8Precision, Recipe


def test_its_settings_are_those_of_the_layers():
    plugin = Float8Precision("rowwise", emulate=True)
    module = plugin.convert_module(ForeignLlama())
    assert {m.settings for m in module.modules() if isinstance(m, Float8Linear)} == {Float8Settings("rowwise", True)}
    assert plugin.multiplies is torch.float8_e4m3fn


def test_where_the_hardware_cannot_it_says_so_before_training(tmp_path):
    with pytest.raises(RuntimeError, match="emulate=True computes with the same rounding"):
        trainer(tmp_path, plugins=[Float8Precision()]).fit(ForeignLlama(), batches())


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"recipe='row' is unknown. Near names: 'rowwise'"):
        Float8Precision("row")
    with pytest.raises(ValueError, match="fp8_all_gather=True needs one scale per weight"):
        Float8Precision("rowwise", fp8_all_gather=True)


def test_gathering_as_fp8_has_no_effect_where_nothing_is_gathered(tmp_path):
    run = trainer(tmp_path, plugins=[Float8Precision(emulate=True, fp8_all_gather=True)])
    with pytest.warns(NoEffectWarning, match=r"fp8_all_gather=True has no effect.*slm_fsdp2"):
        run.fit(ForeignLlama(), batches())


def test_the_recipes_are_torchaos():
    assert sorted(get_args(Recipe)) == sorted(RECIPES)


ON_TWO_RANKS = """
    import os, sys, warnings
    from pathlib import Path
    warnings.simplefilter("ignore")
    import torch
    torch.set_num_threads(1)
    from support import ForeignLlama, batches, differences, kill_and_resume, learned, leave_together, trainer
    from lightning_slm.models import SLMConfig, SLMForCausalLM
    from lightning_slm.quantization.float8 import gathers_float8
    from lightning_slm.strategies.float8_precision import Float8Precision
    from lightning_slm.strategies.fsdp2_strategy import FSDP2Strategy

    folder, results = Path(sys.argv[1]), {}
    RANK = int(os.environ.get("LOCAL_RANK", 0))  # of the second process, which Lightning starts

    class Smooth(ForeignLlama):
        def __init__(self):
            super().__init__()
            sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
            self.net = SLMForCausalLM(SLMConfig(**sizes, pattern="attn/smooth_mlp*2"))

    def pair(gather, base="32-true", **kwargs):
        plugin = Float8Precision(emulate=True, base=base, fp8_all_gather=gather)
        settings = {"plugins": [plugin], "devices": 2, "use_distributed_sampler": False}
        return {**settings, "strategy": FSDP2Strategy(**kwargs) if kwargs else "slm_fsdp2"}

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
    results["shards"] = {key: value.full_tensor() for key, value in module.state_dict().items()}
    torch.save(results, folder / f"results.{RANK}.pt")
    leave_together()
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """One job of two processes for all the tests below."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "ranks.py").write_text(textwrap.dedent(ON_TWO_RANKS))
    run_on_ranks(folder / "ranks.py", folder, timeout=240)
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
