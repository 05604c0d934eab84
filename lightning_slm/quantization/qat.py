"""Quantisation-aware training: layers that compute with the rounding they will be exported with.

The network feels the rounding in its forward pass, gradients pass straight through it (Bengio et al. 2013,
https://arxiv.org/abs/1308.3432; for language models Liu et al. 2023, https://arxiv.org/abs/2305.17888). Layers change
their class in place and nothing else: parameters, state-dict keys, hooks and modes stay, so any checkpoint loads.
"""

# Shape letters: O = outputs, I = inputs, G = groups of a row, V = vocabulary, D = model width.

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_slm.errors import near
from lightning_slm.nn.targets import Patterns, matches, output_heads, weight_targets
from lightning_slm.quantization.fake import fake_quantize_activation, fake_quantize_weight, quantize_weight
from lightning_slm.quantization.layers import check_free, keep_off_fast_path, warn_of_the_rest

EmbeddingBits = Literal["int8", "int4"]


@dataclass(frozen=True, slots=True)
class LayerQuant:
    """How one layer is quantised."""

    bits: int  # of a weight
    group: int  # consecutive inputs that share a scale
    int8_activations: bool = False  # whether the inputs are rounded too, each token to 256 levels


# Bits of a weight, and whether the inputs of the layer are rounded to 8 bits as well.
SCHEMES: dict[str, tuple[int, bool]] = {
    "int8_act_int8_weight": (8, True),
    "int8_act_int4_weight": (4, True),
    "int8_weight": (8, False),
    "int4_weight": (4, False),
    "int2_weight": (2, False),
}


class FakeQuantLinear(nn.Linear):
    """``nn.Linear`` that computes with rounded weights (and inputs), and trains the weights behind them."""

    quant: LayerQuant
    fake_quant_enabled: bool

    def forward(self, x: Tensor) -> Tensor:
        if not self.fake_quant_enabled:
            return F.linear(x, self.weight, self.bias)
        if self.quant.int8_activations:
            x = fake_quantize_activation(x)
        return F.linear(x, fake_quantize_weight(self.weight, self.quant.bits, self.quant.group), self.bias)


class FakeQuantEmbedding(nn.Embedding):
    """``nn.Embedding`` that answers with rounded rows."""

    quant: LayerQuant
    fake_quant_enabled: bool

    def forward(self, ids: Tensor) -> Tensor:
        if not self.fake_quant_enabled:
            return super().forward(ids)
        bits, group = self.quant.bits, self.quant.group
        if ids.numel() < self.num_embeddings:  # a row is rounded alone: round the fewer rows
            rows = super().forward(ids)
            return fake_quantize_weight(rows.reshape(-1, self.embedding_dim), bits, group).view_as(rows)
        return F.embedding(ids, fake_quantize_weight(self.weight, bits, group), self.padding_idx)


Layer = nn.Linear | nn.Embedding
FakeQuantLayer = FakeQuantLinear | FakeQuantEmbedding

_FAKE: dict[type, type] = {nn.Linear: FakeQuantLinear, nn.Embedding: FakeQuantEmbedding}
_PLAIN = {fake: plain for plain, fake in _FAKE.items()}


def prepare_qat_(
    model: nn.Module,
    scheme: str = "int8_act_int4_weight",
    group: int = 32,
    targets: Patterns = "*",
    skip: Patterns = (),
    embedding: EmbeddingBits | None = "int8",
) -> list[str]:
    """Let the linear layers and embeddings of ``model`` compute with rounded weights, in place; doing it twice is fine.

    Args:
        scheme: a name in ``SCHEMES``: bits of the weights, and whether inputs are rounded to 8 bits too.
        group: consecutive inputs that share one scale; 32-128 is usual. Must divide the rows.
        targets: fnmatch patterns of the linear layers to quantise. Embeddings and the output head go by ``embedding``.
        skip: patterns to leave out again, embeddings and head included.
        embedding: bits of the embeddings' and the output head's weights; None leaves them as they are. A head tied to
            an embedding stays one parameter and is rounded alike in both places.

    Returns: the names of the quantised modules.

    Raises:
        ValueError: an unknown scheme, a pattern that matches nothing, a group that does not divide a row, or a layer
            that is prepared differently already.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r} is unknown. {near(scheme, SCHEMES)}")
    if embedding not in (None, "int8", "int4"):
        raise ValueError(f"embedding={embedding!r} must be 'int8', 'int4' or None.")
    bits, int8_activations = SCHEMES[scheme]
    chosen = weight_targets(model, targets, skip)
    wanted = {id(t.weight): LayerQuant(bits, group, int8_activations) for t in chosen}
    if embedding is not None:
        table = LayerQuant(int(embedding.removeprefix("int")), group)
        tables = list(_tables(model))
        skipped = {id(w) for name, w in tables if matches(name, skip)}  # by either name, where two are tied
        wanted |= {id(w): table for _, w in tables if id(w) not in skipped}
    layers = [(name, m, wanted[id(m.weight)]) for name, m in _layers(model) if id(m.weight) in wanted]
    for target in chosen:  # all checks before any change
        check_free(target, FakeQuantLinear)
    for name, module, quant in layers:
        _check(name, module, quant)
    warn_of_the_rest(chosen, [module for _, module, _ in layers])
    for _, module, quant in layers:
        if type(module) in _FAKE:
            module.__class__ = _FAKE[type(module)]
            vars(module).update(quant=quant, fake_quant_enabled=True)
    keep_off_fast_path(model, FakeQuantLinear)
    return [name for name, _, _ in layers]


def enable_fake_quant_(model: nn.Module, enabled: bool = True) -> None:
    """Switch the rounding of a prepared model on or off; off, it computes as if it had never been prepared."""
    for _, module in fake_quant_layers(model):
        module.fake_quant_enabled = enabled


def unprepare_qat_(model: nn.Module) -> None:
    """Give prepared layers their plain class back; the weights stay as they are trained, not rounded."""
    for _, module in fake_quant_layers(model):
        module.__class__ = _PLAIN[type(module)]
        del module.quant, module.fake_quant_enabled


def convert_qat_(model: nn.Module) -> None:
    """Replace the weights of a prepared model by torchao's quantised tensors, in place: for inference, or torchao's
    own exports. The outputs stay the same, bit for bit. A converted model does not train.

    Raises:
        ValueError: the model is not prepared.
    """
    layers = fake_quant_layers(model)
    if not layers:
        raise ValueError("The model has no fake-quantised layers to convert; call prepare_qat_(model) and train first.")
    converted: dict[int, nn.Parameter] = {}
    for name, module in layers:
        weight, quant = module.weight, module.quant
        if id(weight) not in converted:  # a tied weight is converted once
            converted[id(weight)] = nn.Parameter(_torchao_tensor(weight, quant), requires_grad=False)
            real = converted[id(weight)].dequantize()
            if not torch.equal(real, fake_quantize_weight(weight.detach(), quant.bits, quant.group)):
                raise AssertionError(f"{name!r}: the converted weights differ from those the model was trained with.")
        module.__class__ = _PLAIN[type(module)]
        module.weight = converted[id(weight)]
        del module.quant, module.fake_quant_enabled


def fake_quant_layers(model: nn.Module) -> list[tuple[str, FakeQuantLayer]]:
    """The prepared layers and their names, tied ones each."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, FakeQuantLayer)]


def quantize_layer(module: FakeQuantLayer) -> tuple[Tensor, Tensor]:
    """Codes, int8 (O, I), and scales, bfloat16 (O, G), of a prepared layer's weight."""
    return quantize_weight(module.weight, module.quant.bits, module.quant.group)


def _layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Layers whose class we know to use its weight in its own forward, and there only.

    Not so nn.MultiheadAttention's output projection (a subclass of nn.Linear): the attention reads its weight.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and (type(module) in _FAKE or type(module) in _PLAIN):
            yield name, module


def _tables(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights of embeddings and output heads."""
    heads = output_heads(model)
    for name, module in _layers(model):
        if isinstance(module, nn.Embedding) or id(module.weight) in heads:
            yield name, module.weight


def _check(name: str, module: Layer, quant: LayerQuant) -> None:
    prepared = getattr(module, "quant", quant)
    if prepared != quant:
        raise ValueError(
            f"{name!r} is prepared as {prepared} and asked for as {quant}; choose `targets` and `skip` (or embedding="
            "None) so that each layer is quantised in one way, or call unprepare_qat_(model) first."
        )
    inputs = module.weight.shape[-1]
    if quant.group < 2 or inputs % quant.group or inputs % (8 // quant.bits):
        fitting = [g for g in range(8, 257) if inputs % g == 0]
        advice = f"choose group={min(fitting, key=lambda g: abs(g - quant.group))}, or " if fitting else ""
        way_out = "embedding=None" if isinstance(module, nn.Embedding) else f"skip={name!r}"
        raise ValueError(f"{name!r}: group={quant.group} does not divide its rows of {inputs}; {advice}{way_out}.")
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse or module.scale_grad_by_freq):
        raise ValueError(
            f"{name!r}: an embedding with max_norm, sparse or scale_grad_by_freq cannot be fake-quantised; set them "
            f"off, or skip={name!r}."
        )


def _torchao_tensor(weight_OI: Tensor, quant: LayerQuant) -> Tensor:
    from torchao.quantization import IntxUnpackedToInt8Tensor  # here: importing torchao takes seconds

    codes_OI, scale_OG = quantize_weight(weight_OI, quant.bits, quant.group)
    return IntxUnpackedToInt8Tensor(
        qdata=codes_OI,
        scale=scale_OG,
        zero_point=torch.zeros_like(scale_OG, dtype=torch.int8),
        target_dtype=getattr(torch, f"int{quant.bits}"),
        block_size=(1, quant.group),
        dtype=weight_OI.dtype,
        activation_quantization="int8_asym_per_token" if quant.int8_activations else None,
    )
