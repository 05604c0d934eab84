"""Models of many kinds for the calibration engine, and its slow twin."""

from functools import partial

import torch
import transformers
from support import tiny_llama, tiny_slm
from torch import nn

from lightning_slm.calibration import InputNorms, calibrate_
from lightning_slm.models import SLMConfig, SLMForCausalLM
from lightning_slm.nn.blocks import repeated_blocks
from lightning_slm.nn.targets import weight_targets

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}


def ours(pattern, **kwargs):
    torch.manual_seed(0)
    return SLMForCausalLM(SLMConfig(**SIZES, num_key_value_heads=1, pattern=pattern, **kwargs)).eval()


def gpt2():
    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def bert():
    sizes = {**SIZES, "num_hidden_layers": 2, "max_position_embeddings": 32}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).eval()


class OutsideResidual(nn.Module):
    """The residual stream and its norms lie outside of the blocks, which also hand something on to their successors."""

    def __init__(self, width=32):
        super().__init__()
        self.embed = nn.Embedding(96, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width)) for _ in "123")
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in "123")

    def forward(self, input_ids):
        x, first = self.embed(input_ids), None
        for norm, block in zip(self.norms, self.blocks):
            y = block(norm(x))
            first = y if first is None else first
            x = x + y * first.tanh()
        return x


class NoBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(96, 32), nn.Linear(32, 48), nn.Bilinear(48, 48, 8)
        self.last = nn.Linear(8, 16)

    def forward(self, input_ids):
        x = self.first(self.embed(input_ids)).relu()
        return self.last(input=self.second(x, x))  # by keyword


class InPlace(nn.Module):
    """A block that writes to its own input, and reads it twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        x += self.first(x).tanh()
        x += self.second(x).tanh()
        return x


def encoder():
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def plain():
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 32))


TOKENS = {
    "ours": lambda: tiny_slm(),
    "llama": lambda: tiny_llama(),
    "gpt2": gpt2,
    "bert": bert,
    "mamba": lambda: ours("mamba/mlp*2"),
    "mamba2": lambda: ours("mamba2/mlp*2", mixers={"mamba2": {"state_size": 8, "head_dim": 16, "groups": 2}}),
    "lends to the next block": lambda: ours("hymba/mlp hymba_reuse/mlp*2"),
    "moe": lambda: ours("attn/moe*2", mixers={"moe": {"experts": 4, "top_k": 2}}),
    "meta tokens": lambda: ours("hymba/mlp hymba_reuse/mlp", meta_tokens=3),
    "residual outside": OutsideResidual,
    "no blocks": NoBlocks,
}
FEATURES = {"torch's encoder": encoder, "a sequence": plain, "in place": lambda: nn.Sequential(*[InPlace(), InPlace()])}
MODELS = {**TOKENS, **FEATURES}


def make(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def data(name, n=3):
    generator = torch.Generator().manual_seed(1)
    if name in FEATURES:
        return [torch.randn(2, 9, 32, generator=generator) for _ in range(n)]
    return [{"input_ids": torch.randint(96, (2, 9), generator=generator)} for _ in range(n)]


def weaker(weight_OI, energy_I):
    """A compression that depends on the inputs smoothly: no cut at which rounding would decide."""
    return weight_OI * (1 - 0.5 * energy_I / energy_I.max())


def compress(block, layers):
    return {x.name: weaker(x.weight_OI, x.inputs.energy_I) for x in layers if x.inputs is not None}


@torch.no_grad()
def slow_twin(model, batches, run=None):
    """Block after block: run the whole model with a hook on each layer of the block, then compress it."""
    run = run or (lambda batch: model(**batch) if isinstance(batch, dict) else model(batch))
    targets = weight_targets(model)
    blocks = [block for _, block in repeated_blocks(model)]
    inside = [[t for t in targets if any(t.module is m for m in block.modules())] for block in blocks]
    names = {t.name for some in inside for t in some}
    energies = {}
    for some in [*inside, *([t] for t in targets if t.name not in names)]:
        sums = {}

        def hook(name, sums, module, args, kwargs):
            x = (args or list(kwargs.values()))[0]
            sums[name] = sums.get(name, 0) + x.double().reshape(-1, x.shape[-1]).pow(2).sum(0)

        handles = [t.module.register_forward_pre_hook(partial(hook, t.name, sums), with_kwargs=True) for t in some]
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        for batch in batches:
            run({k: v.clone() for k, v in batch.items()} if isinstance(batch, dict) else batch.clone())
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
        for t in (t for t in some if t.name in sums):
            weight_OI = t.weight if t.input_dim == 1 else t.weight.T
            new = weaker(weight_OI.double(), sums[t.name]).to(t.weight.dtype)
            t.weight.copy_(new if t.input_dim == 1 else new.T)
            energies[t.name] = sums[t.name]
    return energies


def keeping(energies, calls=None):
    """`compress`, and a note of the statistics."""

    def compress_and_note(block, layers):
        energies.update({x.name: x.inputs.energy_I.clone() for x in layers if x.inputs is not None})
        if calls is not None:
            calls.append(block)
        return compress(block, layers)

    return compress_and_note


def calibrated(model, batches, compress=compress, statistic=InputNorms, **kwargs):
    calibrate_(model, batches, weight_targets(model), compress, statistic, progress=False, **kwargs)
    return model


def same(a, b, tolerance=1e-5):
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
