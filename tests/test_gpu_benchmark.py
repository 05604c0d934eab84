"""The GPU benchmark goes all its ways, on a CPU with a tiny model: that it runs, not what it measures."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FOLDER / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_variant_trains_and_every_goal_gets_its_line(gpu, monkeypatch):
    monkeypatch.delenv("SLM_GPU_SMOKE", raising=False)
    results = gpu.Results("gpu")
    gpu.run(results, smoke=True)
    lines = [goal.what for goal in results.goals]
    ways = [(how, name) for name in gpu.VARIANTS for how in ("eager", "compiled blocks")]
    runs = [f"tiny, {how}: tokens/s of {name} / {gpu.THEIRS}" for how, name in ways]
    assert set(runs) <= set(lines)
    assert [line for line in lines if line not in runs] == [
        "tiny, compiled blocks: MFU of CausalLM, bf16-mixed",
        "tiny, compiled blocks: tokens/s of CausalLM, FP8 tensorwise / CausalLM, bf16-mixed",
        "tiny, compiled blocks: tokens/s of CausalLM, FP8 rowwise / CausalLM, bf16-mixed",
    ]
    assert all(goal.value > 0 and "tokens/s" in goal.what + goal.detail for goal in results.goals[:-3])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: it would run")
def test_without_a_gpu_it_says_so_and_adds_nothing(gpu, capsys, monkeypatch):
    monkeypatch.delenv("SLM_GPU_SMOKE", raising=False)
    results = gpu.Results("gpu")
    gpu.run(results)
    assert results.goals == []
    assert "not run: needs a CUDA device" in capsys.readouterr().out


def test_the_real_thing_is_the_published_sizes(gpu):
    real = {setting.name: setting for setting in gpu.settings(smoke=False)}
    assert set(real) == {"mobilellm-125m", "tinyllama-1.1b"}
    with torch.device("meta"):
        models = {name: gpu.SLMForCausalLM(setting.config) for name, setting in real.items()}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert counts == {"mobilellm-125m": 124_635_456, "tinyllama-1.1b": 1_100_048_384}
