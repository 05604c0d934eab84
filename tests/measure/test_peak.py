"""The table against NVIDIA's data sheets, its own ratios, and what Lightning says; the measured peak by its order."""

from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from lightning_slm.measure.peak import PEAKS, measured_peak, peak_flops

CARD = Path(__file__).parents[2] / "callbacks" / "throughput_monitor.md"

# As torch.cuda.get_device_name writes them, and what the data sheets say of bf16 (fp16 where there is no bf16) in
# TFLOP/s, "with sparsity" halved.
NAMES = {
    "NVIDIA H100 80GB HBM3": 1979 / 2,
    "NVIDIA H100 PCIe": 1513 / 2,
    "NVIDIA H100 NVL": 1671 / 2,
    "NVIDIA H200": 1979 / 2,
    "NVIDIA H200 NVL": 1671 / 2,
    "NVIDIA GH200 480GB": 1979 / 2,
    "NVIDIA B200": 4500 / 2,
    "NVIDIA B100": 3500 / 2,
    "NVIDIA GB200": 5000 / 2,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 140 / 2,
    "NVIDIA A40": 149.7,
    "NVIDIA L4": 242 / 2,
    "NVIDIA L40": 362 / 2,
    "NVIDIA L40S": 362,
    "Tesla V100-SXM2-32GB": 125,
    "Tesla V100-PCIE-16GB": 112,
    "Tesla V100S-PCIE-32GB": 130,
    "Tesla T4": 65,
    "NVIDIA GeForce RTX 3090": 142 / 2,
    "NVIDIA GeForce RTX 3090 Ti": 160 / 2,
    "NVIDIA GeForce RTX 4090": 330.4 / 2,
    "NVIDIA GeForce RTX 5090": 419 / 2,
    "NVIDIA RTX 6000 Ada Generation": 728.4 / 2,
    "AMD Instinct MI300X": 1307.4,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_is_found_by_the_name_that_torch_gives_it(name):
    dtype = torch.float16 if "V100" in name or "T4" in name else torch.bfloat16
    assert peak_flops(name, dtype) == pytest.approx(NAMES[name] * 1e12, rel=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "Quadro T400",
    ],
)
def test_a_slice_or_a_smaller_sibling_is_not_taken_for_the_whole(name):
    assert peak_flops(name, torch.float16) is None


def test_the_columns_stand_to_each_other_as_tensor_cores_do():
    """From tf32 to fp16 the rate doubles, and again to one byte; bf16 is as fast as fp16, where there is any."""
    for peaks in filter(None, PEAKS.values()):
        assert peaks.bf16 in (None, peaks.fp16)
        assert peaks.tf32 is None or 1.97 <= peaks.fp16 / peaks.tf32 <= 2.03
        assert peaks.int8 is None or 1.97 <= peaks.int8 / peaks.fp16 <= 4.01
        assert peaks.fp8 is None or 1.97 <= peaks.fp8 / peaks.fp16 <= 2.03
        assert peaks.fp32 <= (peaks.tf32 or peaks.fp16)


def test_the_table_of_the_card_is_this_one():
    table = CARD.read_text().partition("| GPU |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[2:8]] for line in table.splitlines()[2:]]
    printed = [[None if cell == "\u2013" else float(cell) for cell in row] for row in rows]
    assert printed == [list(peaks) for peaks in PEAKS.values() if peaks is not None]


def test_dtypes():
    assert peak_flops("NVIDIA H200", torch.float8_e4m3fn) == peak_flops("NVIDIA H200", torch.float8_e5m2) == 1979e12
    assert peak_flops("NVIDIA H200", torch.float32) == 67e12
    assert peak_flops("NVIDIA H200", "tf32") == 494.5e12
    assert peak_flops("Tesla T4", "tf32") == peak_flops("Tesla T4", torch.float32) == 8.1e12
    assert peak_flops("Tesla T4", torch.bfloat16) is None
    assert peak_flops("NVIDIA A100-SXM4-40GB", torch.float8_e4m3fn) is None
    assert peak_flops("NVIDIA H200", torch.float64) is None
    assert peak_flops("mps", torch.float32) is None


@pytest.mark.filterwarnings("ignore:FLOPs not found")
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("NVIDIA H200", None),  # not found
        ("NVIDIA B200", None),
        ("NVIDIA H100 NVL", 1978.8),  # two cards
        ("NVIDIA A10G", 125),  # that of an A10
        ("NVIDIA GeForce RTX 4090", 82.6),  # that of its ordinary cores
        ("NVIDIA H100 80GB HBM3", 989.4),  # as ours
    ],
)
def test_what_lightning_says_instead(monkeypatch, name, theirs):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = get_available_flops(torch.device("cuda"), torch.bfloat16)
    assert found == (None if theirs is None else pytest.approx(theirs * 1e12))
    ours = peak_flops("cuda", torch.bfloat16)
    assert ours == pytest.approx(NAMES[name] * 1e12, rel=1e-3)
    assert (theirs == 989.4) == (found is not None and abs(found / ours - 1) < 1e-3)


def test_a_cpu_is_measured_once():
    first = measured_peak(torch.float32)
    assert 1e9 < first < 1e14
    assert peak_flops("cpu", torch.float32) == measured_peak("tf32") == first  # the very same: not measured again
    a = torch.randn(128, 128)
    assert torch.equal(a @ a, a @ a)  # and it left no mode behind
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_measuring_draws_no_random_numbers_and_knows_what_it_cannot_do():
    before = torch.random.get_rng_state()
    assert measured_peak(torch.int4) is None
    assert measured_peak(torch.bfloat16) > 0
    assert torch.equal(before, torch.random.get_rng_state())
