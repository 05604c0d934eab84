"""ADMMPruning: that it is the function, at the moment asked for, and that the zeros stay."""

import pytest
import torch
from support import ForeignLlama, batches, differences, kill_and_resume, learned, trainer

from lightning_slm.callbacks import ADMMPruning
from lightning_slm.nn.targets import weight_targets
from lightning_slm.pruning import admm_


def fit(folder, *callbacks, steps=4):
    torch.manual_seed(0)
    module = ForeignLlama()
    trainer(folder, callbacks, steps=steps).fit(module, batches())
    return module


def weights(module):
    return {t.name: t.weight.detach().clone() for t in weight_targets(module)}


def test_a_model_that_is_only_validated_gets_the_weights_of_the_function(tmp_path):
    given = list(batches(n=8))
    asked = {"sparsity": 0.6, "iterations": 12, "mask_iterations": 5, "damping": 0.2}
    torch.manual_seed(0)
    module = ForeignLlama()
    callback = ADMMPruning(**asked, calibration=given)
    trainer(tmp_path, [callback]).validate(module, batches(n=4), verbose=False)
    torch.manual_seed(0)
    reference = ForeignLlama()
    results = admm_(reference.net, given, **asked, progress=False)
    assert differences(weights(module), weights(reference)) == []
    assert {f"net.{name}": result for name, result in results.items()} == callback.results


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("when", ["start", "end"])
def test_the_zeros_are_exact_after_training(tmp_path, group, when):
    module = fit(tmp_path, ADMMPruning(0.5, group=group, when=when, calibration=4))
    for weight in weights(module).values():
        assert int((weight == 0).sum()) == weight.numel() // 2
        if group is not None:
            assert ((weight.view(-1, 4) == 0).sum(1) == 2).all()


@pytest.mark.parametrize("saved_at", [1, 3])
def test_a_killed_and_resumed_run_is_bit_identical(tmp_path, saved_at):
    def callbacks():
        return [ADMMPruning(0.5, calibration=4)]

    straight, resumed = kill_and_resume(ForeignLlama, callbacks, tmp_path, saved_at=saved_at, steps=6)
    assert differences(learned(straight), learned(resumed)) == []


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"iterations": 5}, "iterations=5 and mask_iterations=15"),
        ({"damping": -1.0}, "damping=-1.0 must be a share"),
        ({"group": 3}, r"'net.model.layers.0.self_attn.q_proj.weight': sparsity=0.5 of group=3"),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(tmp_path, asked, complaint):
    with pytest.raises(ValueError, match=complaint):
        fit(tmp_path, ADMMPruning(**asked))
