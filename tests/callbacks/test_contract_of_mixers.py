"""Every callback and every precision plugin, on every mixer at tiny size."""

# Shape letters: V = vocabulary.

import pytest
import torch
from contract import (
    EVERY_PRECISION,
    comparable,
    layer_of,
    muon_in_float32,
    without_fresh_processes,
)
from mixers import CHANNELS, DECODERS, V, config_of
from support import batches, differences, kill_and_resume, trainer

from lightning_slm.callbacks import GradualPruning, KnowledgeDistillation, QuantizationAwareTraining
from lightning_slm.models import SLMForCausalLM
from lightning_slm.modules import CausalLM
from lightning_slm.nn.targets import protected_weights, weight_targets, what_is_left_alone

MIXERS = {**DECODERS, **{f"-/{name}": tiny for name, tiny in CHANNELS.items() if name != "mlp"}}
every_mixer = pytest.mark.parametrize("mixer", MIXERS)


@pytest.fixture(autouse=True)
def _comparable_numbers(monkeypatch):
    from lightning_slm.measure import measured
    from lightning_slm.modules import muon_adamw

    monkeypatch.setattr(measured, "peak_memory", measured.peak_memory)  # put back afterwards
    monkeypatch.setattr(muon_adamw, "fast_dtype", muon_adamw.fast_dtype)
    monkeypatch.setattr("lightning_slm.measure.plot.draw", lambda report: b"")  # half the time of a report
    without_fresh_processes()
    muon_in_float32()


def module_of(mixer, **values):
    return CausalLM(SLMForCausalLM(config_of(MIXERS[mixer], initializer_range=0.05, **values)))


def loader(**kwargs):
    return batches(words=V, **kwargs)


def learning(mixer):
    """Prune, round and imitate at once."""
    with torch.random.fork_rng():
        torch.manual_seed(42)
        teacher = SLMForCausalLM(config_of(MIXERS[mixer]))
    return [
        GradualPruning(sparsity=0.5, group=4, end=0.75, every=2),
        QuantizationAwareTraining(group=16, begin=0.3),
        KnowledgeDistillation(teacher=teacher),
    ]


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create")
@every_mixer
def test_pruned_rounded_and_distilled_at_once_a_killed_run_goes_on_bit_for_bit(mixer, tmp_path):
    straight, resumed = kill_and_resume(lambda: module_of(mixer), lambda: learning(mixer), tmp_path, loader)
    assert differences(comparable(straight), comparable(resumed)) == []


@every_mixer
def test_half_of_the_matrices_is_zero_afterwards_and_what_is_protected_is_whole(mixer, tmp_path):
    module = module_of(mixer)
    trainer(tmp_path, [GradualPruning(sparsity=0.5, group=4, end=0.5, every=1)], steps=4).fit(module, loader())
    targets = weight_targets(module)
    assert targets
    for target in targets:
        assert (target.weight == 0).float().mean() == 0.5, target.name
    names = dict(module.named_parameters())
    for name in protected_weights(module):
        assert not (names[name] == 0).float().mean() > 0.4, name


@pytest.mark.filterwarnings("ignore::lightning_slm.errors.NoEffectWarning")  # layers too small for blocks of 32
@every_mixer
@pytest.mark.parametrize("precision", EVERY_PRECISION)
def test_every_precision_trains_every_mixer(mixer, precision, tmp_path):
    module = module_of(mixer)
    kinds = {name: type(m) for name, m in module.named_modules()}
    run = trainer(tmp_path, steps=3, plugin=EVERY_PRECISION[precision])
    frozen = precision.startswith(("NF4", "LLMInt8"))
    if frozen:
        for p in module.model.parameters():
            p.requires_grad_(p.ndim == 1)
    run.fit(module, loader())
    assert torch.isfinite(torch.stack([p.float().sum() for p in module.parameters()])).all()
    exchanged = {name for name, m in module.named_modules() if layer_of(precision) in type(m).__name__}
    assert exchanged
    for name in protected_weights(module):
        owner = name.rpartition(".")[0]
        assert type(module.get_submodule(owner)) is kinds[owner], name


def test_what_is_left_alone_is_said_and_refused_as_a_target(tmp_path, caplog):
    run = trainer(tmp_path, [GradualPruning(sparsity=0.5, end=0.5)], steps=2)
    with caplog.at_level("INFO"):
        run.fit(module_of("mamba"), loader())
    assert (
        "GradualPruning: decays, short convolutions, routers and their like stay as they are: A_log (2)" in caplog.text
    )
    with pytest.raises(ValueError, match=r"A_log' is protected"):
        weight_targets(module_of("mamba"), "*A_log")
    assert what_is_left_alone(module_of("attn")) is None
