"""WandaPruning: when it prunes, on what, and that the zeros stay."""

import json
import sys
import warnings

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, RichProgressBar
from lightning.pytorch.cli import LightningCLI
from support import (
    ForeignLlama,
    GivenBatches,
    Notes,
    batches,
    differences,
    kill_and_resume,
    learned,
    run_on_ranks,
    trainer,
)
from torch import nn

from lightning_slm.callbacks import CompressionReport, GradualPruning, MagnitudePruning, WandaPruning
from lightning_slm.errors import NoEffectWarning
from lightning_slm.nn.targets import weight_targets
from lightning_slm.pruning import wanda_


def fit(folder, *callbacks, module=None, steps=4, **kwargs):
    torch.manual_seed(0)
    module = module or ForeignLlama()
    run = trainer(folder, callbacks, steps=steps, **kwargs)
    run.fit(module, batches())
    return module


def zeros(module):
    return {t.name: t.weight.detach() == 0 for t in weight_targets(module)}


def share(module):
    found = zeros(module).values()
    return sum(int(z.sum()) for z in found) / sum(z.numel() for z in found)


class Look(Callback):
    """The share of zeros wherever it is looked for, and those of the momenta."""

    def __init__(self):
        self.at, self.momenta = {}, []

    def on_train_start(self, trainer, pl_module):
        self.at["start"] = share(pl_module)

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.at.setdefault("first step", share(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.at.setdefault("after the first step", share(pl_module))
        for t in weight_targets(pl_module):
            moment = trainer.optimizers[0].state[t.weight]["exp_avg"]
            self.momenta.append(bool((moment[t.weight == 0] == 0).all()))

    def on_train_end(self, trainer, pl_module):
        self.at["end"] = share(pl_module)

    def on_fit_end(self, trainer, pl_module):
        self.at["fit end"] = share(pl_module)

    def on_validation_start(self, trainer, pl_module):
        self.at.setdefault("validation", share(pl_module))


@pytest.mark.parametrize("group", [None, 4])
def test_it_prunes_before_the_first_step_as_the_function_does_and_holds_the_zeros(tmp_path, group):
    given, look = list(batches(n=8)), Look()
    module = fit(tmp_path, look, WandaPruning(0.5, group=group, calibration=given))
    torch.manual_seed(0)
    reference = ForeignLlama()
    wanda_(reference.net, given, group=group, progress=False)
    assert look.at == {"start": 0.0, "first step": 0.5, "after the first step": 0.5, "end": 0.5, "fit end": 0.5}
    assert all(look.momenta)
    assert differences(zeros(module), zeros(reference)) == []


def test_at_the_end_it_prunes_after_all_callbacks_an_average_included(tmp_path):
    for i, order in enumerate(([0, 1], [1, 0])):
        look = Look()
        callbacks = [EMAWeightAveraging(decay=0.8), WandaPruning(0.5, group=4, when="end", calibration=4)]
        module = fit(tmp_path / str(i), look, *(callbacks[j] for j in order))
        assert look.at == {"start": 0.0, "first step": 0.0, "after the first step": 0.0, "end": 0.0, "fit end": 0.5}
        assert all((z.view(-1, 4).sum(1) == 2).all() for z in zeros(module).values())
        assert set(callbacks[1].results) == set(zeros(module))


def test_an_average_of_the_weights_forgets_pruned_ones(tmp_path):
    for i, order in enumerate(([0, 1], [1, 0])):
        callbacks = [EMAWeightAveraging(decay=0.9), WandaPruning(0.5, group=4, calibration=4)]
        module = fit(tmp_path / str(i), *(callbacks[j] for j in order), steps=6)
        assert all((z.view(-1, 4).sum(1) == 2).all() for z in zeros(module).values())


@pytest.mark.parametrize("saved_at", [1, 3, 17])  # 16 steps are an epoch
def test_a_killed_and_resumed_run_is_bit_identical(tmp_path, saved_at):
    def callbacks():
        return [WandaPruning(0.5, group=4, calibration=4)]

    straight, resumed = kill_and_resume(ForeignLlama, callbacks, tmp_path, saved_at=saved_at, steps=20)
    assert differences(learned(straight), learned(resumed)) == []


class ZeroBorn(ForeignLlama):
    """A projection that is zero before it learns."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.net.model.layers[0].self_attn.o_proj.weight)


def test_a_matrix_that_is_born_zero_is_pruned_to_its_share_and_learns_with_the_rest(tmp_path):
    def callbacks():
        return [WandaPruning(0.5, calibration=4)]

    straight, resumed = kill_and_resume(ZeroBorn, callbacks, tmp_path, saved_at=3, steps=6)
    assert differences(learned(straight), learned(resumed)) == []
    weight = straight["state_dict"]["net.model.layers.0.self_attn.o_proj.weight"]
    assert int((weight == 0).sum()) == weight.numel() // 2


def test_its_calibration_is_not_noticed_by_training(tmp_path):
    """Neither the data's order nor the random numbers."""

    class Seen(Callback):
        def __init__(self):
            self.batches, self.numbers = [], []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.batches.append(batch["input_ids"].clone())
            self.numbers.append(torch.rand(()))

    seen = [Seen(), Seen()]
    fit(tmp_path, seen[0])
    fit(tmp_path, WandaPruning(calibration=4), seen[1])
    assert differences(seen[0].batches + seen[0].numbers, seen[1].batches + seen[1].numbers) == []


def test_another_seed_is_other_data(tmp_path):
    results = [WandaPruning(0.5, calibration=4, seed=seed) for seed in (0, 0, 1)]
    masks = [zeros(fit(tmp_path, callback)) for callback in results]
    assert differences(masks[0], masks[1]) == []
    assert differences(masks[0], masks[2]) != []


def test_a_model_that_is_only_validated_is_pruned_first_and_only_once(tmp_path):
    for when in ("start", "end"):
        torch.manual_seed(0)
        module, look = ForeignLlama(), Look()
        run = trainer(tmp_path, [WandaPruning(0.5, when=when, calibration=4), look])
        data = GivenBatches(list(batches(n=8)))
        run.validate(module, datamodule=data, verbose=False)
        assert look.at["validation"] == share(module) == 0.5
        before = zeros(module)
        run.test(module, datamodule=data, verbose=False)
        run.validate(module, batches(n=4), verbose=False)  # no data to calibrate on, and no need
        assert differences(zeros(module), before) == []


def test_without_training_data_it_says_what_to_give(tmp_path):
    run = trainer(tmp_path, [WandaPruning(0.5)])
    with pytest.raises(ValueError, match=r"no training data to calibrate on.*calibration=\[\.\.\.\]"):
        run.validate(ForeignLlama(), batches(n=4), verbose=False)


def test_the_share_of_zeros_is_logged(tmp_path):
    notes = Notes()
    fit(tmp_path, WandaPruning(0.25, calibration=2), logger=notes)
    assert [values["slm/sparsity"] for values in notes.steps.values()] == [0.25] * 4
    notes = Notes()
    pair = [WandaPruning(0.25, calibration=2, targets="*mlp*"), MagnitudePruning(0.5, targets="*self_attn*")]
    fit(tmp_path, *pair, logger=notes)
    assert {name for name in notes.steps[3] if "sparsity" in name} == {
        "slm/sparsity/*mlp*", "slm/sparsity/*self_attn*",
    }  # fmt: skip
    assert notes.steps[3]["slm/sparsity/*mlp*"] == 0.25


def test_several_prune_in_an_order_of_their_own_the_sparsest_last(tmp_path):
    def make():
        return [
            WandaPruning(0.5, group=4, calibration=2),
            MagnitudePruning(0.25),
            GradualPruning(0.75, end=0.5, every=1),
        ]

    ends = [fit(tmp_path, *(make()[i] for i in order), steps=6) for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0])]
    assert all(differences(dict(ends[0].state_dict()), dict(end.state_dict())) == [] for end in ends)
    assert share(ends[0]) == 0.75


def test_a_report_measures_the_dense_model_before(tmp_path):
    for i, order in enumerate(([0, 1], [1, 0])):
        folder = tmp_path / str(i)
        report = CompressionReport(batches=1, prompt_tokens=2, new_tokens=2, runs=1, folder=str(folder))
        callbacks = [report, WandaPruning(0.5, calibration=2)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(tmp_path, *(callbacks[j] for j in order))
        found = json.loads((folder / "report.json").read_text())
        shares = [found["rows"]["sparsity"][when] for when in ("before", "after")]
        assert shares == [0.0, 0.5]


def test_our_progress_bar_stands_beside_lightnings_rich_one(tmp_path):
    run = trainer(tmp_path, [RichProgressBar(), WandaPruning(0.5, calibration=2)], steps=2, enable_progress_bar=True)
    module = ForeignLlama()
    run.fit(module, batches())
    assert share(module) == 0.5


def test_outlier_weighted_shares_reach_the_sparsity_asked_for(tmp_path):
    callback = WandaPruning(0.5, budget="layer", calibration=4, allocation="owl")
    module = fit(tmp_path, callback)
    by_block = [
        sum(int(z.sum()) for n, z in zeros(module).items() if f"layers.{i}." in n)
        / sum(z.numel() for n, z in zeros(module).items() if f"layers.{i}." in n)
        for i in range(2)
    ]
    assert share(module) == pytest.approx(0.5, abs=1e-3)
    assert abs(by_block[0] - by_block[1]) == pytest.approx(0.16, abs=1e-3)
    assert callback.sparsity == 0.5


def test_a_global_budget_and_shares_by_pattern_are_kept_while_training(tmp_path):
    module = fit(tmp_path, WandaPruning(0.5, budget="global", calibration=4))
    assert share(module) == 0.5
    assert len({z.float().mean().item() for z in zeros(module).values()}) > 1
    module = fit(tmp_path, WandaPruning({"*down_proj": 0.0, "*": 0.25}, calibration=4))
    assert {z.float().mean().item() for n, z in zeros(module).items() if "down" in n} == {0.0}
    assert {z.float().mean().item() for n, z in zeros(module).items() if "down" not in n} == {0.25}


def test_shares_by_pattern_survive_yaml(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning"])
    wanted = {"sparsity": {"*self_attn*": 0.4, "*": 0.6}, "budget": "layer", "when": "end"}
    config = {"trainer": {"callbacks": [{"class_path": "WandaPruning", "init_args": wanted}]}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    settings = {"run": False, "save_config_callback": None, "seed_everything_default": 0}
    cli = LightningCLI(ForeignLlama, args=[f"--config={tmp_path / 'c.yaml'}", "--trainer.logger=false"], **settings)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, WandaPruning)]
    assert {name: getattr(callback, name) for name in wanted} == wanted
    assert list(callback.sparsity) == ["*self_attn*", "*"]  # the first that matches counts


def test_a_model_that_is_sparser_already_is_not_pruned_and_that_is_said(tmp_path):
    module = fit(tmp_path, WandaPruning(0.75, calibration=2))
    with pytest.warns(
        NoEffectWarning, match=r"came with \d+ zeros.*more than the \d+ asked for \(sparsity=0.5\): nothing"
    ):
        fit(tmp_path, WandaPruning(0.5, calibration=2), module=module)
    once = fit(tmp_path, WandaPruning(0.5, calibration=2))
    before = zeros(once)
    again = fit(tmp_path, WandaPruning(0.5, calibration=2), module=once)  # as sparse as asked: its zeros are held
    assert differences(zeros(again), before) == []


def test_a_run_resumed_with_a_higher_sparsity_prunes_on(tmp_path):
    run = trainer(tmp_path, [WandaPruning(0.25, calibration=2)], steps=3)
    torch.manual_seed(0)
    run.fit(ForeignLlama(), batches())
    run.save_checkpoint(tmp_path / "a.ckpt")
    module = ForeignLlama()
    further = trainer(tmp_path, [WandaPruning(0.5, calibration=2)], steps=5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using .ckpt_path")
        further.fit(module, batches(), ckpt_path=tmp_path / "a.ckpt")
    assert share(module) == 0.5


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"when": "epoch"}, "when='epoch' must be 'start' or 'end'"),
        ({"calibration": 0}, "calibration=0 must be at least 1 batch"),
        ({"allocation": "even"}, "allocation='even' must be 'uniform' or 'owl'"),
        ({"allocation": "owl", "group": 4}, "allocation='owl' settles the blocks' shares"),
        ({"budget": "model"}, "budget='model' must be 'row', 'layer' or 'global'"),
        ({"sparsity": 1.5}, "sparsity=1.5 must lie between 0 and 1"),
        ({"targets": "*q_prj"}, r"targets='\*q_prj' matches no weight of the model. Near names: .*q_proj'"),
        ({"calibration": [{"text": "a"}]}, r"a batch has 'text', but LlamaForCausalLM.forward takes 'input_ids'"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, asked, complaint):
    with pytest.raises(ValueError, match=complaint):
        fit(tmp_path, WandaPruning(**asked))


RANKS = """
import os, sys, torch
from support import ForeignLlama, batches, leave_together, trainer
from lightning_slm.callbacks import MagnitudePruning, WandaPruning
from lightning_slm.nn.sharded import whole
from lightning_slm.nn.targets import weight_targets
if __name__ == "__main__":
    folder, strategy = sys.argv[1:]
    torch.set_num_threads(1)
    found = {}
    for name, make in {
        "wanda": lambda: WandaPruning(0.5, group=4, calibration=4),
        "global": lambda: WandaPruning(0.5, budget="global", calibration=4),
        "owl": lambda: WandaPruning(0.5, allocation="owl", calibration=4),
        "end": lambda: WandaPruning(0.5, when="end", calibration=4),
        "magnitude": lambda: MagnitudePruning(0.5, budget="global"),
    }.items():
        torch.manual_seed(0)
        module = ForeignLlama()
        run = trainer(folder, [make()], steps=3, strategy=strategy, devices=2)
        run.fit(module, batches(n=32))
        found[name] = {t.name: whole(t.weight.detach()).clone() for t in weight_targets(module)}
    torch.save(found, f"{folder}/{os.environ.get('LOCAL_RANK', 0)}.pt")
    leave_together()
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "slm_fsdp2", "slm_zero1"])
def test_ranks_calibrate_on_data_of_their_own_and_prune_alike(tmp_path, strategy):
    """With 4 batches on each of two ranks, what one process does with the 8 of both."""
    (tmp_path / "ranks.py").write_text(RANKS)
    run_on_ranks(tmp_path / "ranks.py", tmp_path, strategy, timeout=240)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert differences(*ranks) == []
    for name, weights in ranks[0].items():
        total = sum(int((w == 0).sum()) for w in weights.values()) / sum(w.numel() for w in weights.values())
        assert total == pytest.approx(0.5, abs=2e-2 if name == "owl" else 1e-6), name
    alone = zeros(fit(tmp_path, WandaPruning(0.5, group=4, calibration=8), steps=1))
    agree = [(alone[n] == (w == 0)).float().mean().item() for n, w in ranks[0]["wanda"].items()]
    assert min(agree) > 0.999
