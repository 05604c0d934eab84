"""Every precision plugin with every callback, on one process and on two under every strategy: bit-identical after a
kill, or refused with the reason.
"""

from functools import partial

import pytest
import torch
from contract import (
    EVERY_CALLBACK,
    EVERY_PRECISION,
    MODULES,
    STRATEGIES,
    combinable,
    comparable,
    flat,
    muon_in_float32,
    refusal,
    without_fresh_processes,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from support import ForeignLlama, batches, differences, kill_and_resume, trainer
from torch import nn

import lightning_slm
from lightning_slm import strategies as registry
from lightning_slm.nn.targets import weight_targets
from lightning_slm.strategies._low_bit import LowBitPrecision, refuse_strategy

every_precision = pytest.mark.parametrize("precision", EVERY_PRECISION)
one_of_each = pytest.mark.parametrize("precision", [name for name in EVERY_PRECISION if "," not in name])


@pytest.fixture(autouse=True)
def _comparable_numbers(monkeypatch):
    from lightning_slm.measure import measured
    from lightning_slm.modules import muon_adamw

    monkeypatch.setattr(measured, "peak_memory", measured.peak_memory)  # put back afterwards
    monkeypatch.setattr(muon_adamw, "fast_dtype", muon_adamw.fast_dtype)
    without_fresh_processes()
    muon_in_float32()


def test_the_table_has_every_precision_of_the_registry():
    plugins = {name for name in registry.__all__ if issubclass(getattr(registry, name), LowBitPrecision)}
    assert {name.partition(",")[0] for name in EVERY_PRECISION} == plugins
    assert set(registry.__all__) < set(lightning_slm.__all__)


@every_precision
@pytest.mark.parametrize("callback", EVERY_CALLBACK)
def test_each_pair_resumes_bit_identically_or_is_refused_with_the_reason(tmp_path, precision, callback):
    make, plugin = EVERY_CALLBACK[callback].make, EVERY_PRECISION[precision]
    reason = refusal(precision, callback)
    if reason is not None:
        run = trainer(tmp_path, [make("foreign")], plugin=plugin)
        with pytest.raises(ValueError, match=reason):
            run.fit(ForeignLlama(), batches(), batches(n=4))
        return
    ends = kill_and_resume(ForeignLlama, lambda: [make("foreign")], tmp_path, plugin=plugin)
    assert differences(*map(comparable, ends)) == []
    assert list(ends[0]["state_dict"]) == list(ForeignLlama().state_dict())


@every_precision
def test_with_all_that_go_together_our_own_module_resumes_bit_identically(tmp_path, precision):
    make = partial(combinable, "ours", precision)
    ends = kill_and_resume(MODULES["ours"].make, make, tmp_path, plugin=EVERY_PRECISION[precision])
    assert differences(*map(comparable, ends)) == []
    loaded = type(MODULES["ours"].make()).load_from_checkpoint(tmp_path / "end.ckpt")  # without any of us
    assert differences(dict(loaded.state_dict()), dict(ends[0]["state_dict"])) == []


@one_of_each
@pytest.mark.parametrize("base", ["32-true", "bf16-mixed", "bf16-true"])
def test_every_base_trains_and_keeps_weights_in_its_dtype(tmp_path, precision, base):
    module = ForeignLlama()
    plugin = partial(EVERY_PRECISION[precision].func, **{**EVERY_PRECISION[precision].keywords, "base": base})
    run = trainer(tmp_path, plugin=plugin)
    before = flat(module)
    run.fit(module, batches(), batches(n=4))
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point() and p.requires_grad}
    assert dtypes == {torch.bfloat16 if base == "bf16-true" else torch.float32}
    run.validate(module, batches(n=4), verbose=False)  # in inference mode
    assert torch.isfinite(torch.tensor(float(run.callback_metrics["val_loss"])))
    trained = [p for p in module.parameters() if p.requires_grad]
    assert not torch.equal(before[: trained[0].numel()], trained[0].detach().flatten().to(before.dtype))


@one_of_each
def test_a_second_conversion_changes_nothing_and_embeddings_and_head_are_left_alone(precision):
    module, plugin = ForeignLlama(), EVERY_PRECISION[precision]()
    kept = {name: p for name, p in module.named_parameters() if "embed" in name or "norm" in name}
    plugin.convert_module(module)
    once = {name: (type(m), id(m)) for name, m in module.named_modules()}
    weights = flat(module)
    plugin.convert_module(module)
    assert {name: (type(m), id(m)) for name, m in module.named_modules()} == once
    assert torch.equal(flat(module), weights)
    assert sorted(plugin.converted) == sorted(t.module_name for t in weight_targets(ForeignLlama()))
    assert type(module.net.lm_head) is nn.Linear
    assert all(dict(module.named_parameters())[name] is p for name, p in kept.items())


@one_of_each
def test_strategies_with_weights_of_their_own_are_refused_early(precision):
    plugin = EVERY_PRECISION[precision]()
    with pytest.raises(TypeError, match="FSDP strategy can only work with the `FSDPPrecision` plugin"):
        FSDPStrategy().precision_plugin = plugin
    module = ForeignLlama()

    class Run:
        strategy = object.__new__(DeepSpeedStrategy)

    module._trainer = Run()
    with pytest.raises(ValueError, match=r'does not work with DeepSpeedStrategy.*strategy="slm_fsdp2"'):
        plugin.convert_module(module)
    module._trainer = None
    refuse_strategy(plugin, module)


@one_of_each
def test_beside_precision_as_a_string_a_plugin_is_refused(tmp_path, precision):
    with pytest.raises(ValueError, match="Received both `precision=bf16-mixed` and `plugins="):
        trainer(tmp_path, plugin=EVERY_PRECISION[precision], precision="bf16-mixed")


@pytest.mark.slow
@pytest.mark.xdist_group("contract on two ranks")
@every_precision
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_on_two_ranks_with_all_that_go_together_it_resumes_bit_identically(two_ranks, strategy, precision):
    found = two_ranks(strategy)[precision]
    assert "error" not in found
    assert found["differences"] == []
    assert found["ranks agree"]
    assert found["steps"] == 8
    assert list(found["state_dict"]) == list(ForeignLlama().state_dict())
