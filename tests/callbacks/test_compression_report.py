"""The report of a run: what it says is what was there, and the run is as it would have been without it."""

import json
import math
import warnings

import pytest
import torch
from lightning.pytorch import LightningDataModule
from support import Demo, ForeignLlama, batches, checkpoint, differences, trainer
from transformers import AutoModelForCausalLM

from lightning_slm.callbacks import CompressionReport, GradualPruning, QuantizationAwareTraining
from lightning_slm.callbacks._find import network_of
from lightning_slm.export import save_hf_folder
from lightning_slm.measure import file_bytes, summed_nats


class Data(LightningDataModule):
    """Random tokens that know how many bytes they stand for."""

    path = "random tokens"

    def train_dataloader(self):
        return batches()

    def val_dataloader(self):
        return batches()

    def bytes_per_token(self, split):
        return {"val": 2.5}[split]


def quick(**kwargs):
    return CompressionReport(**{"batches": 2, "prompt_tokens": 2, "new_tokens": 3, "runs": 1, **kwargs})


def rows(folder):
    return json.loads((folder / "report.json").read_text())["rows"]


@pytest.fixture
def no_fresh_process(monkeypatch):
    """Without the measure of peak memory, which takes seconds; one test has it."""
    monkeypatch.setattr("lightning_slm.measure.measured._measure_memory", lambda *args: None)


@pytest.mark.slow
def test_the_report_of_a_pruned_and_quantised_model_is_of_the_exported_artefact(tmp_path):
    module = ForeignLlama()
    start = {k: v.clone() for k, v in module.net.state_dict().items()}
    pruning = GradualPruning(sparsity=0.5, group=4, end=0.5, every=1)
    quantisation = QuantizationAwareTraining("int4_weight", group=32)
    trainer(tmp_path, [quick(), pruning, quantisation]).fit(module, datamodule=Data())
    report = rows(tmp_path / "report")

    # Sparsity, by hand: half of every layer's matrices.
    assert (report["sparsity"]["before"], report["sparsity"]["after"]) == (0.0, 0.5)
    # Bytes, by exporting again: the dense model as it was, the compressed one as it is.
    exported = save_hf_folder(module.net, tmp_path / "after")
    assert report["file_bytes"]["after"] == file_bytes(tmp_path / "after") == exported.bytes
    dense = ForeignLlama().net
    dense.load_state_dict(start)
    dense.save_pretrained(tmp_path / "before")
    assert report["file_bytes"]["before"] == file_bytes(tmp_path / "before")
    ratio = file_bytes(tmp_path / "before") / exported.bytes
    assert report["compression_ratio"]["after"] == pytest.approx(ratio)
    # Quality, by evaluating what was exported, and the model as it was.
    first = [batch for batch, _ in zip(batches(), range(2))]
    for when, net in (("before", dense), ("after", AutoModelForCausalLM.from_pretrained(tmp_path / "after"))):
        nats = summed_nats(net, first)
        assert report["perplexity"][when] == pytest.approx(nats.perplexity, rel=1e-4)
        assert report["bits_per_byte"][when] == pytest.approx(math.log2(nats.perplexity) / 2.5, rel=1e-4)
    assert report["weight_bytes"]["after"] < 0.5 * report["weight_bytes"]["before"]
    missing = [key for key, row in report.items() if row["before"] is None or row["after"] is None]
    assert missing == []
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"report.json", "report.md", "report.png"}
    assert "random tokens, validation split, the first 2 batches" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.usefixtures("no_fresh_process")
def test_training_is_bit_for_bit_as_without_it(tmp_path):
    ends = []
    for name, callbacks in (("with", [quick()]), ("without", [])):
        torch.manual_seed(0)
        run = trainer(tmp_path / name, callbacks, steps=4)
        run.fit(Demo(dropout=0.2), batches(pairs=True), batches(pairs=True))
        ends.append(checkpoint(run))
    assert differences(ends[0]["state_dict"], ends[1]["state_dict"]) == []


@pytest.mark.usefixtures("no_fresh_process")
def test_a_resumed_run_reports_the_original_before(tmp_path):
    data = {"train_dataloaders": batches(), "val_dataloaders": batches()}
    first = trainer(tmp_path / "first", [quick()], steps=2)
    first.fit(ForeignLlama(), **data)
    first.save_checkpoint(tmp_path / "middle.ckpt")
    torch.manual_seed(99)
    second = trainer(tmp_path / "second", [quick()], steps=4)
    second.fit(ForeignLlama(), **data, ckpt_path=tmp_path / "middle.ckpt")
    one, two = rows(tmp_path / "first" / "report"), rows(tmp_path / "second" / "report")
    assert {k: row["before"] for k, row in one.items()} == {k: row["before"] for k, row in two.items()}
    assert two["perplexity"]["after"] != one["perplexity"]["after"]
    assert "before: the model at step 0" in (tmp_path / "second" / "report" / "report.md").read_text()


@pytest.mark.usefixtures("no_fresh_process")
def test_a_run_that_ended_before_its_report_gets_it_when_run_again(tmp_path):
    first = trainer(tmp_path, [quick()], steps=2)
    first.fit(ForeignLlama(), datamodule=Data())
    first.save_checkpoint(tmp_path / "end.ckpt")
    written = rows(tmp_path / "report")
    (tmp_path / "report" / "report.json").unlink()
    again = trainer(tmp_path, [quick()], steps=2)
    again.fit(ForeignLlama(), datamodule=Data(), ckpt_path=tmp_path / "end.ckpt")
    assert rows(tmp_path / "report")["bits_per_byte"] == written["bits_per_byte"]


@pytest.mark.usefixtures("no_fresh_process")
def test_no_hook_stays_on_the_module_and_none_is_called_per_step(tmp_path):
    module = ForeignLlama()
    trainer(tmp_path, [quick()], steps=2).fit(module, batches(), batches())
    hooked = [m for m in module.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    assert hooked == []
    assert "training_step" not in vars(module)
    overridden = {name for name in vars(CompressionReport) if name.startswith(("on_", "setup", "teardown"))}
    assert overridden == {"setup", "on_train_start", "on_fit_end"}


@pytest.mark.usefixtures("no_fresh_process")
def test_without_validation_data_quality_is_left_out_with_a_reason(tmp_path):
    trainer(tmp_path, [quick()], steps=1).fit(ForeignLlama(), batches())
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["rows"]["perplexity"]["after"] is None
    assert "no batches to evaluate on" in report["not_measured"]["after"]["perplexity"]
    assert report["rows"]["file_bytes"]["after"] > 0


def test_the_demo_of_lightning_is_measured_as_far_as_it_goes(tmp_path):
    trainer(tmp_path, [quick()], steps=2).fit(Demo(), batches(pairs=True), batches(pairs=True))
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["rows"]["perplexity"]["after"] < report["rows"]["perplexity"]["before"]
    assert "cannot be exported" in report["not_measured"]["after"]["file_bytes"]
    assert "tokens_per_second" in report["not_measured"]["before"]


@pytest.mark.usefixtures("no_fresh_process")
def test_before_is_dense_where_fake_quantisation_begins_at_once(tmp_path):
    module = Demo()
    expected = summed_nats(module, [b for b, _ in zip(batches(pairs=True), range(2))]).perplexity
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not every layer of the demo can be quantised
        quantisation = QuantizationAwareTraining("int2_weight", group=32, embedding=None)
        trainer(tmp_path, [quantisation, quick()], steps=1).fit(module, batches(pairs=True), batches(pairs=True))
    assert rows(tmp_path / "report")["perplexity"]["before"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("no_fresh_process")
def test_another_baseline_and_another_folder(tmp_path):
    larger = ForeignLlama(hidden=64).net
    larger.save_pretrained(tmp_path / "larger")
    for baseline in (larger, str(tmp_path / "larger")):
        callbacks = [quick(baseline=baseline, folder=str(tmp_path / "here"))]
        trainer(tmp_path, callbacks, steps=1).fit(ForeignLlama(), batches(), batches())
        parameters = rows(tmp_path / "here")["parameters"]
        assert parameters["before"] == sum(p.numel() for p in larger.parameters()) > parameters["after"]


def test_two_reports_have_states_of_their_own():
    assert quick().state_key != quick(folder="elsewhere").state_key
    assert quick().state_dict() == {}


def test_the_network_is_the_child_that_generates_and_trains():
    module = torch.nn.Module()
    module.teacher = ForeignLlama().net.requires_grad_(False)
    module.student = ForeignLlama().net
    assert network_of(module) is module.student
    demo = Demo()
    assert network_of(demo) is demo
