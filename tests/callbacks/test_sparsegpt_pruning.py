"""SparseGPTPruning: that it is the function, at the moment asked for, and that the zeros stay."""

import pytest
import torch
from support import ForeignLlama, batches, differences, kill_and_resume, learned, run_on_ranks, trainer

from lightning_slm.callbacks import SparseGPTPruning
from lightning_slm.nn.targets import weight_targets
from lightning_slm.pruning import sparsegpt_


def fit(folder, *callbacks, module=None, steps=4, **kwargs):
    torch.manual_seed(0)
    module = module or ForeignLlama()
    trainer(folder, callbacks, steps=steps, **kwargs).fit(module, batches())
    return module


def weights(module):
    return {t.name: t.weight.detach().clone() for t in weight_targets(module)}


def test_a_model_that_is_only_validated_gets_the_weights_of_the_function(tmp_path):
    given, asked = list(batches(n=8)), {"sparsity": 0.6, "block_size": 16, "damping": 0.05}
    torch.manual_seed(0)
    module = ForeignLlama()
    callback = SparseGPTPruning(**asked, calibration=given)
    trainer(tmp_path, [callback]).validate(module, batches(n=4), verbose=False)
    torch.manual_seed(0)
    reference = ForeignLlama()
    results = sparsegpt_(reference.net, given, **asked, progress=False)
    assert differences(weights(module), weights(reference)) == []
    assert {f"net.{name}": result for name, result in results.items()} == callback.results


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("when", ["start", "end"])
def test_the_zeros_are_exact_after_training(tmp_path, group, when):
    module = fit(tmp_path, SparseGPTPruning(0.5, group=group, when=when, calibration=4))
    for weight in weights(module).values():
        assert int((weight == 0).sum()) == weight.numel() // 2
        if group is not None:
            assert ((weight.view(-1, 4) == 0).sum(1) == 2).all()


@pytest.mark.parametrize("saved_at", [1, 3])
def test_a_killed_and_resumed_run_is_bit_identical(tmp_path, saved_at):
    def callbacks():
        return [SparseGPTPruning(0.5, calibration=4)]

    straight, resumed = kill_and_resume(ForeignLlama, callbacks, tmp_path, saved_at=saved_at, steps=6)
    assert differences(learned(straight), learned(resumed)) == []


def test_outlier_weighted_shares_reach_the_sparsity_asked_for(tmp_path):
    module = fit(tmp_path, SparseGPTPruning(0.5, calibration=4, allocation="owl"))
    found = weights(module).values()
    share = sum(int((w == 0).sum()) for w in found) / sum(w.numel() for w in found)
    assert share == pytest.approx(0.5, abs=1e-3)


def test_too_little_data_is_said_by_name_once_for_layers_that_share_their_inputs(tmp_path):
    tokens = [{"input_ids": torch.zeros(1, 2, dtype=torch.long), "labels": torch.zeros(1, 2, dtype=torch.long)}]
    with pytest.warns(UserWarning, match="damping=0 is too little") as caught:
        module = fit(tmp_path, SparseGPTPruning(0.5, damping=0.0, calibration=tokens), steps=1)
    named = [str(w.message).split("'")[1] for w in caught if "too little" in str(w.message)]
    kinds = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    assert named == [f"net.model.layers.{i}.{kind}.weight" for i in range(2) for kind in kinds]
    assert all(w.isfinite().all() for w in weights(module).values())


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"damping": -1.0}, "damping=-1.0 must be a share"),
        ({"group": 3}, r"'net.model.layers.0.self_attn.q_proj.weight': sparsity=0.5 of group=3"),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(tmp_path, asked, complaint):
    with pytest.raises(ValueError, match=complaint):
        fit(tmp_path, SparseGPTPruning(**asked))


RANKS = """
import os, sys, torch
from support import ForeignLlama, batches, leave_together, trainer
from lightning_slm.callbacks import ADMMPruning, SparseGPTPruning
from lightning_slm.nn.sharded import whole
from lightning_slm.nn.targets import weight_targets
if __name__ == "__main__":
    folder, strategy = sys.argv[1:]
    torch.set_num_threads(1)
    found = {}
    for make in (SparseGPTPruning, ADMMPruning):
        torch.manual_seed(0)
        module = ForeignLlama()
        run = trainer(folder, [make(0.5, group=4, calibration=4)], steps=3, strategy=strategy, devices=2)
        run.fit(module, batches(n=32))
        found[make.__name__] = {t.name: whole(t.weight.detach()).clone() for t in weight_targets(module)}
    torch.save(found, f"{folder}/{os.environ.get('LOCAL_RANK', 0)}.pt")
    leave_together()
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "slm_fsdp2", "slm_zero1"])
def test_ranks_add_up_their_statistics_and_solve_alike(tmp_path, strategy):
    """ADMM's too. With 4 batches on each of two ranks, the zeros of one process with the 8 of both."""
    (tmp_path / "ranks.py").write_text(RANKS)
    run_on_ranks(tmp_path / "ranks.py", tmp_path, strategy, timeout=240)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert differences(*ranks) == []
    for found in ranks[0].values():
        assert all(((weight.view(-1, 4) == 0).sum(1) == 2).all() for weight in found.values())
    alone = weights(fit(tmp_path, SparseGPTPruning(0.5, group=4, calibration=8), steps=1))
    agree = [((alone[n] == 0) == (w == 0)).float().mean().item() for n, w in ranks[0]["SparseGPTPruning"].items()]
    assert min(agree) > 0.99
