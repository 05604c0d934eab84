"""`DynamicBatchLoading`: shares by the paper's formula from losses that are measured; resumed, and equal on two ranks.

As a script, ``python tests/callbacks/test_dynamic_batch_loading.py FOLDER``: on two ranks.
"""

import itertools
import os
import random
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from contract import STRATEGIES
from lightning.pytorch.cli import LightningCLI
from support import (
    ForeignLlama,
    GivenBatches,
    Killed,
    Notes,
    SaveAndDie,
    batches,
    checkpoint,
    differences,
    learned,
    leave_together,
    run_on_ranks,
    trainer,
)

from lightning_slm.callbacks import DynamicBatchLoading, ShearedPruning
from lightning_slm.data import DomainData, exponential_ascent
from lightning_slm.models import SLMConfig, SLMForCausalLM
from lightning_slm.modules import CausalLM
from lightning_slm.pruning import shape_of

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create")
REFERENCE = {"code": 2.0, "prose": 3.5}  # both are above in the few steps of these runs


def texts(folder):
    """Two domains: one of three words, one of fifty."""
    made, chosen = {}, random.Random(5)
    for name, words in (("code", ["def", "return", "self"]), ("prose", [f"w{i}" for i in range(50)])):
        made[name] = str(folder / name)
        (folder / name).mkdir(exist_ok=True)
        for number in range(40):
            (folder / name / f"{number:02}.txt").write_text(f"{number} {' '.join(chosen.choices(words, k=200))}\n")
    return made


def data(folder, ranks=1):
    sizes = {"vocab_size": 300, "window": 16, "batch_size": 4 // ranks}
    return DomainData(texts(folder), **sizes, val_fraction=0.2, cache_dir=str(folder / "cache"))


def module():
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64}
    config = SLMConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, pattern="attn/mlp*2")
    return CausalLM(SLMForCausalLM(config), lambda groups: torch.optim.AdamW(groups, lr=3e-3))


def dynamic(**kwargs):
    return DynamicBatchLoading(**{"reference": REFERENCE, "every": 3, "batches": 2, **kwargs})


def straight_and_resumed(folder, make, saved_at, **kwargs):
    ends = []
    for part in ("straight", "killed", "resumed"):
        notes, text = Notes(), data(folder, kwargs.get("devices", 1))
        if part == "killed":
            # The one that saves stands before us, and after us would be the same.
            run = trainer(folder, [SaveAndDie(folder / "saved.ckpt", saved_at), *make()], enable_checkpointing=True,
                          steps=12, **kwargs)  # fmt: skip
            with pytest.raises(Killed):
                run.fit(module(), text)
            continue
        run = trainer(folder, make(), steps=12, logger=notes, **kwargs)
        run.fit(module(), text, ckpt_path=folder / "saved.ckpt" if part == "resumed" else None)
        later = {step: values for step, values in notes.steps.items() if step >= saved_at}
        later = {s: {k: v for k, v in values.items() if "domain" not in k} for s, values in later.items()}
        ends.append({**checkpoint(run), "notes": later, "updates": text.updates})
    return ends


@pytest.mark.parametrize("saved_at", [2, 3, 4, 6])
def test_a_killed_and_resumed_run_is_bit_identical(tmp_path, saved_at):
    ends = straight_and_resumed(tmp_path, lambda: [dynamic()], saved_at)
    assert differences(*map(learned, ends)) == []
    assert differences(ends[0]["updates"], ends[1]["updates"]) == []
    assert [update["step"] for update in ends[0]["updates"]] == [3, 6, 9]
    assert ends[0]["DomainData"] == ends[1]["DomainData"]
    assert len({tuple(update["shares"]) for update in ends[0]["updates"]}) == 3


def test_with_accumulated_gradients_it_measures_once_a_step_and_resumes(tmp_path):
    ends = straight_and_resumed(tmp_path, lambda: [dynamic()], 3, accumulate_grad_batches=2)
    assert differences(*map(learned, ends)) == []
    assert [update["step"] for update in ends[0]["updates"]] == [3, 6, 9]


def test_shares_follow_from_the_measured_losses_by_the_formula(tmp_path):
    text, notes, measured = data(tmp_path), Notes(), []
    callback = dynamic(every=4)
    ascend = callback.new_shares
    callback.new_shares = lambda shares, losses: (measured.append((shares, losses)), ascend(shares, losses))[1]
    net = module()
    run = trainer(tmp_path, [callback], steps=6, logger=notes)
    begin = data(tmp_path).shares
    run.fit(net, text)
    ((shares, losses),) = measured
    assert shares == begin
    assert text.shares == exponential_ascent(begin, losses, REFERENCE)
    assert notes.steps[4]["slm/domain_loss/prose"] == pytest.approx(losses["prose"], rel=1e-6)
    assert notes.steps[4]["slm/domain_share/code"] == pytest.approx(text.shares["code"], rel=1e-6)


def test_the_loss_is_the_mean_over_the_tokens_of_the_domain(tmp_path):
    """Against the module's own validation on that domain alone: 1e-5."""
    text, net = data(tmp_path), module()
    callback, found = dynamic(batches=1000), {}
    run = trainer(tmp_path, [callback], steps=4)
    callback.new_shares = lambda shares, losses: (found.update(losses), shares)[1]
    net_before = {}
    callback_start = callback.on_train_batch_start

    def keep(trainer, pl_module, *args):
        if trainer.global_step == 3:
            net_before.update({k: v.clone() for k, v in pl_module.state_dict().items()})
        callback_start(trainer, pl_module, *args)

    callback.on_train_batch_start = keep
    run.fit(net, text)
    for name in REFERENCE:
        plain = module()  # one that has not validated on data that knows its bytes
        plain.load_state_dict(net_before)
        (own,) = trainer(tmp_path).validate(plain, text.domain_loader(name), verbose=False)
        assert found[name] == pytest.approx(own["val_loss"], rel=1e-5)


def test_with_learned_masks_in_either_order_the_model_s_own_gates_are_measured(tmp_path):
    ends = []
    for first in (True, False):
        callbacks = [dynamic(), ShearedPruning({"ffn": 32, "layers": 1}, end=0.7)]
        text, net = data(tmp_path), module()
        run = trainer(tmp_path, callbacks if first else callbacks[::-1], steps=12)
        run.fit(net, text)
        assert shape_of(net)["ffn"] == 32
        ends.append({"weights": dict(net.state_dict()), "updates": text.updates})
    assert len(ends[0]["updates"]) == 3
    assert differences(*ends) == []


def test_data_without_these_domains_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"NoneType has none: give trainer.fit a DomainData"):
        trainer(tmp_path, [dynamic()]).fit(ForeignLlama(), batches())
    with pytest.raises(ValueError, match="GivenBatches has none"):
        trainer(tmp_path, [dynamic()]).fit(ForeignLlama(), GivenBatches([]))
    with pytest.raises(ValueError, match="reference has code, wiki, but the domains are code, prose"):
        trainer(tmp_path, [dynamic(reference={"code": 1.0, "wiki": 1.0})]).fit(module(), data(tmp_path))
    with pytest.raises(ValueError, match="at least 1"):
        dynamic(every=0)


def test_yaml_in_yaml_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning"])
    wanted = {"reference": {"code": 1.5, "prose": 2.5}, "every": 7}
    about = {"domains": texts(tmp_path), "window": 16, "shares": {"code": 0.25, "prose": 0.75}}
    made = {
        "trainer": {"callbacks": [{"class_path": "DynamicBatchLoading", "init_args": wanted}], "logger": False},
        "data": {"class_path": "DomainData", "init_args": about},
    }
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(made))
    settings = {"run": False, "save_config_callback": None, "seed_everything_default": 0}
    from lightning.pytorch import LightningDataModule

    args = [f"--config={tmp_path / 'short.yaml'}"]
    cli = LightningCLI(ForeignLlama, LightningDataModule, subclass_mode_data=True, args=args, **settings)
    callback = next(c for c in cli.trainer.callbacks if type(c) is DynamicBatchLoading)
    assert {key: getattr(callback, key) for key in wanted} == wanted
    assert cli.datamodule.domains == about["domains"]
    assert cli.datamodule.window == 16


@pytest.mark.slow
def test_on_two_ranks_both_have_the_same_shares_as_one_process_and_resume(tmp_path):
    texts(tmp_path)
    run_on_ranks(Path(__file__), tmp_path, timeout=240)
    (alone, _) = straight_and_resumed(tmp_path, lambda: [dynamic(batches=1000)], 4)
    for rank, strategy in itertools.product(range(2), STRATEGIES):
        found = torch.load(tmp_path / f"{strategy}.{rank}.pt")
        assert found["differences"] == []
        assert len(found["updates"]) == 3
        for theirs, ours in zip(found["updates"], alone["updates"]):
            assert {**theirs, "shares": pytest.approx(theirs["shares"], rel=1e-4)} == ours


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for strategy in STRATEGIES:
        pair = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}
        ends = straight_and_resumed(folder, lambda: [dynamic(batches=1000)], 4, **pair)
        found = {"differences": differences(*map(learned, ends)), "updates": ends[0]["updates"]}
        torch.save(found, folder / f"{strategy}.{os.environ.get('LOCAL_RANK', 0)}.pt")
    leave_together()
