"""The three files of a report say the same, and say why something is missing."""

import json
import os

import matplotlib.image
import pytest
import torch
from support import VOCABULARY, Demo, ForeignLlama

from lightning_slm.measure import QUANTITIES, Measured, Method, Report, compare, file_bytes, measure_model

SETTING = {
    "windows": 8,
    "window": 64,
    "predicted_tokens": 504,
    "bytes_per_token": 3.5,
    "prompt_tokens": 4,
    "new_tokens": 8,
    "runs": 3,
    "device": "cpu",
    "dtype": "float32",
}
BEFORE = {"bits_per_byte": 1.5, "perplexity": 30.0, "sparsity": 0.0, "file_bytes": 16e6, "tokens_per_second": 500.0}
AFTER = {"bits_per_byte": 1.56, "perplexity": 33.0, "sparsity": 0.5, "file_bytes": 3.2e6, "tokens_per_second": 400.0}


def made_up(reasons=None):
    before = Measured(BEFORE, reasons or {}, SETTING)
    return Report(before, Measured(AFTER, {}, SETTING), {"data": "a text, validation split"})


@pytest.fixture(scope="module")
def measured():
    """A dense and a half-pruned model, really measured; Hugging Face's own export."""
    torch.manual_seed(0)
    dense, pruned = ForeignLlama().net, ForeignLlama().net
    with torch.no_grad():
        for layer in pruned.model.layers:
            layer.mlp.up_proj.weight[:, ::2] = 0
    batches = [torch.randint(VOCABULARY, (2, 16)) for _ in range(2)]
    method = Method(prompt_tokens=3, new_tokens=4, runs=1, targets="*up_proj", bytes_per_token=2.0)
    return compare(dense, pruned, batches, method), dense


@pytest.mark.slow
def test_every_quantity_of_a_hugging_face_model_is_measured(measured, tmp_path):
    report, dense = measured
    assert report.before.reasons == report.after.reasons == {}
    assert set(report.before.values) == {q.key for q in QUANTITIES}
    assert (report.before.values["sparsity"], report.after.values["sparsity"]) == (0.0, 0.5)
    dense.save_pretrained(tmp_path)
    assert report.before.values["file_bytes"] == file_bytes(tmp_path)
    assert report.before.setting["windows"] == 4
    assert 0 < report.before.values["peak_memory_bytes"] < 300e6


def test_measuring_changes_neither_weights_nor_mode(monkeypatch):
    monkeypatch.setattr("lightning_slm.measure.measured._measure_memory", lambda *args: None)  # takes seconds
    dense = ForeignLlama().net.train()
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    measure_model(dense, [torch.randint(VOCABULARY, (1, 8))], Method(prompt_tokens=2, new_tokens=2, runs=1))
    assert dense.training
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())


def test_json_markdown_and_table_agree(tmp_path):
    report = made_up()
    report.save(tmp_path)
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["rows"]["file_bytes"] == {
        "label": "exported file",
        "unit": "byte",
        "better": "lower",
        "before": 16e6,
        "after": 3.2e6,
    }
    assert read["rows"]["compression_ratio"]["after"] == pytest.approx(5.0)
    assert read["headline"] == "5.00x smaller file, 1.040x the bits per byte"
    markdown = (tmp_path / "report.md").read_text()
    assert "| exported file | 16.0 MB | 3.2 MB | 0.200x |" in markdown
    assert "| sparsity | 0.0 % | 50.0 % |  |" in markdown
    for at_the_foot in ("a text, validation split", "8 windows of 64 tokens", "threads", f"torch {torch.__version__}"):
        assert at_the_foot in markdown
    assert report.table().row_count == len(QUANTITIES) + 1


def test_the_picture_shows_something(tmp_path):
    made_up().save(tmp_path)
    pixels = matplotlib.image.imread(tmp_path / "report.png")
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 1000
    # Bars of "after" in their blue, somewhere; and mostly white paper.
    blue = (abs(pixels[..., :3] - [0x2F / 255, 0x6F / 255, 0xDE / 255]) < 0.02).all(-1)
    assert 0.01 < blue.mean() < 0.2
    assert (pixels[..., :3] == 1).all(-1).mean() > 0.6


def test_a_missing_value_is_told_with_its_reason():
    report = made_up({"perplexity": "there are no batches to evaluate on"})
    del report.before.values["perplexity"]
    assert "| perplexity | n/a | 33.00 |  |" in report.to_markdown()
    assert "- not measured: perplexity; there are no batches to evaluate on" in report.to_markdown()


def test_an_unfair_comparison_says_so():
    report = made_up()
    other = Report(report.before, Measured(AFTER, {}, {**SETTING, "windows": 4}))
    assert "not alike: windows 8 before, 4 after" in other.notes()


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    made_up().save(tmp_path)
    before = (tmp_path / "report.json").read_bytes()

    def power_cut(*args):
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", power_cut)
    with pytest.raises(OSError, match="power cut"):
        Report(made_up().after, made_up().after).save(tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before


def test_a_model_that_can_do_little_is_measured_as_far_as_it_goes():
    measured = measure_model(Demo().model, None, Method(runs=1))
    assert set(measured.values) == {"parameters", "sparsity", "weight_bytes"}
    assert set(measured.reasons) == {q.key for q in QUANTITIES} - set(measured.values)
    assert "no save_pretrained" in measured.reasons["file_bytes"]
    assert "no batches" in measured.reasons["perplexity"]
