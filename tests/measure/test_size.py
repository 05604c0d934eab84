"""Parameters, zeros and bytes, counted by hand."""

import pytest
import torch
from support import ForeignLlama
from torch import nn

from lightning_slm.measure import count_parameters, file_bytes, sparsity, sparsity_by_layer, weight_bytes
from lightning_slm.quantization import PackedLinear, convert_qat_, prepare_qat_


def test_a_tied_matrix_is_counted_once_in_parameters_and_in_bytes():
    net = ForeignLlama().net
    embedding, attention, mlp, norms = 64 * 32, 4 * 32 * 32, 3 * 32 * 64, 2 * 32
    by_hand = embedding + 2 * (attention + mlp + norms) + 32
    assert count_parameters(net).total == by_hand
    rotary = sum(b.nbytes for b in net.buffers())
    assert weight_bytes(net) == 4 * by_hand + rotary


def test_sparsity_is_of_the_targeted_weights_and_leaves_out_embeddings():
    net = ForeignLlama().net
    with torch.no_grad():
        net.model.embed_tokens.weight.zero_()
        net.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    assert sparsity(net, "*layers.0*up_proj") == 0.5
    assert sparsity(net) == pytest.approx((64 * 32 / 2) / (2 * (4 * 32 * 32 + 3 * 32 * 64)))
    by_layer = sparsity_by_layer(net, "*up_proj", skip="*layers.1*")
    assert by_layer == {"model.layers.0.mlp.up_proj.weight": 0.5}


def test_a_pattern_that_matches_nothing_names_what_is_near():
    with pytest.raises(ValueError, match=r"up_pro.*up_proj"):
        sparsity(ForeignLlama().net, "*up_pro")


def test_bytes_of_packed_weights_are_those_of_their_codes_and_scales():
    layer = PackedLinear(64, 32, bias=False, bits=4, group=32, int8_activations=False)
    assert weight_bytes(layer) == 32 * 64 // 2 + 2 * 32 * (64 // 32)


def test_a_packed_layer_counts_as_the_weights_that_it_stands_for():
    net = nn.Sequential(PackedLinear(64, 32, bias=False, bits=4, group=32, int8_activations=False), nn.Linear(32, 2))
    assert count_parameters(net).total == 64 * 32 + 2 * 32 + 2


def test_bytes_of_torchaos_tensors_are_those_of_what_they_hold():
    layer = nn.Sequential(nn.Linear(64, 32, bias=False))
    prepare_qat_(layer, "int4_weight", group=32, embedding=None)
    convert_qat_(layer)
    held = layer[0].weight
    assert weight_bytes(layer) == held.qdata.nbytes + held.scale.nbytes + held.zero_point.nbytes
    assert count_parameters(layer).total == 64 * 32


def test_a_view_counts_by_the_memory_that_it_keeps_alive():
    whole = torch.zeros(100)
    net = nn.Module()
    net.register_buffer("a", whole[:10])
    net.register_buffer("b", whole[10:20])
    assert weight_bytes(net) == 400


def test_bytes_of_a_folder_are_those_of_its_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "deep" / "b").write_bytes(b"123")
    assert (file_bytes(tmp_path), file_bytes(tmp_path / "a")) == (8, 5)
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        file_bytes(tmp_path / "c")
