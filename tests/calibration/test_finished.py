"""Calibrations that are killed and go on: nothing is done twice, nothing foreign or broken is taken."""

import threading

import pytest
import torch
from calibrated import calibrated, compress, data, gpt2, make, same
from support import tiny_llama
from torch import nn


class Killed(Exception):
    """The process was killed."""


def killed_at(block, calls):
    def solve(name, layers):
        calls.append(name)
        if block in name:
            raise Killed
        return compress(name, layers)

    return solve


@pytest.mark.parametrize("name", ["llama", "gpt2", "residual outside", "no blocks"])
def test_a_calibration_goes_on_after_the_finished_blocks_and_ends_as_if_it_had_not_been_killed(tmp_path, name):
    calls, whole = [], []
    straight = calibrated(make(name), data(name), lambda *a: whole.append(a[0]) or compress(*a))
    with pytest.raises(Killed):
        calibrated(make(name), data(name), killed_at(whole[1], calls), folder=tmp_path)
    again = calibrated(make(name), data(name), lambda *a: calls.append(a[0]) or compress(*a), folder=tmp_path)
    same(again, straight, 0.0)
    assert calls == [*whole[:2], *whole[1:]]  # the second was not finished
    done = calibrated(make(name), data(name), killed_at("", calls), folder=tmp_path)  # nothing is left to do
    same(done, straight, 0.0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_very_model_that_was_left_half_compressed_goes_on_too(tmp_path, name):
    straight, model, names = make(name), make(name), []
    calibrated(straight, data(name), lambda *a: names.append(a[0]) or compress(*a))
    with pytest.raises(Killed):
        calibrated(model, data(name), killed_at(names[1], []), folder=tmp_path)
    calibrated(model, data(name), folder=tmp_path)
    same(model, straight, 0.0)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("weights", "blocks of another model"),
        ("targets", "blocks of another model"),
        ("about", r"something else was done: \{'sparsity': 0.5\}, and now \{'sparsity': 0.6\}"),
    ],
)
def test_a_folder_of_something_else_is_refused_before_anything_happens(tmp_path, change, complaint):
    calibrated(make("llama"), data("llama"), folder=tmp_path, about={"sparsity": 0.5})
    model = make("llama")
    if change == "weights":
        nn.init.normal_(model.model.layers[1].mlp.up_proj.weight)
    if change == "targets":
        model.model.layers = model.model.layers[:1]
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=complaint):
        calibrated(model, data("llama"), folder=tmp_path, about={"sparsity": 0.6 if change == "about" else 0.5})
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_half_files_are_not_taken_and_broken_ones_are_named(tmp_path):
    straight = calibrated(make("llama"), data("llama"), folder=tmp_path)
    second = tmp_path / "block_1.safetensors"
    content = second.read_bytes()
    second.unlink()
    (tmp_path / "block_1.123.tmp").write_bytes(content[:100])  # as a process leaves it that is killed while it writes
    same(calibrated(make("llama"), data("llama"), folder=tmp_path), straight, 0.0)
    before = threading.active_count()
    second.write_bytes(content[:100])
    with pytest.raises(
        ValueError, match=r"block_1.safetensors is damaged .*delete it, and its block will be done again"
    ):
        calibrated(make("llama"), data("llama"), folder=tmp_path)
    assert threading.active_count() == before
    (tmp_path / "about.json").write_text("{")
    with pytest.raises(ValueError, match=r"about.json is damaged"):
        calibrated(make("llama"), data("llama"), folder=tmp_path)


def test_a_folder_is_made_where_there_is_none_and_holds_the_blocks_in_order(tmp_path):
    calibrated(tiny_llama(), data("llama"), folder=tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "about.json", "block_0.safetensors", "block_1.safetensors",
    ]  # fmt: skip


def test_weights_in_bf16_are_kept_bit_for_bit(tmp_path):
    models = [gpt2().to(torch.bfloat16) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    calibrated(models[0], data("gpt2"), folder=tmp_path)
    calibrated(models[1], data("gpt2"), folder=tmp_path)
    same(models[0], models[1], 0.0)
