"""Gates on the units of a model: the masked view, through which scores and learned masks look at it.

With gates of exactly 0 and 1, the gated model computes what the smaller one (`shrink`) computes. In between, they are
what learned masks train: hard-concrete gates (Louizos et al. 2018, https://arxiv.org/abs/1712.01312) of heads (Voita et
al. 2019, https://arxiv.org/abs/1905.09418) or of everything (Sheared LLaMA, Xia et al. 2024,
https://arxiv.org/abs/2310.06694), and their gradient at 1 is the importance of a head (Michel et al. 2019,
https://arxiv.org/abs/1905.10650).
"""

# Shape letters: U = units of a group, N = all leading axes, D = width of the residual stream.

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_slm.errors import near
from lightning_slm.pruning.structure import UNITS, Group, Place, Unit, groups_of, is_transposed, structure_of
from lightning_slm.pruning.structure_families import network_in


@contextlib.contextmanager
def gated(model: nn.Module, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the units of a model by gates, through which gradients flow.

    Heads and feed-forward units are multiplied where the layer after them reads. A channel of the residual stream is
    multiplied wherever it is written, and after each norm; the norms take their statistics over the channels whose gate
    is not 0 (the rule of Sheared LLaMA, also for its soft gates). A layer becomes ``x + gate * (layer(x) - x)``.

    Args:
        model: as for `structure_of`.
        gates: shape (size,) each, by the names of groups. They are looked up in each forward pass: a mapping whose
            values change is followed. No names may be added.

    Raises:
        ValueError: a name or a shape that does not fit.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=6, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))
    >>> with gated(model, {"model.layers.0.mlp/ffn": (gate := torch.ones(6, requires_grad=True))}):
    ...     model(torch.tensor([[1, 2]])).logits.sum().backward()
    >>> gate.grad.shape
    torch.Size([6])
    """
    groups = named_groups(model, gates)
    handles: list[RemovableHandle] = []
    try:
        for group in groups:
            checked_gate(group, gates[group.name])
            handles += [_hook(place, lambda name=group.name: gates[name]) for place in group.places]  # type: ignore[misc]
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def fold_(model: nn.Module, gates: Mapping[str, Tensor]) -> None:
    """Multiply gates into the weights, in place: the model then computes without them what it did with them.

    For soft gates of units that stay; where some are 0, the norms agree again once `shrink_` has removed those.

    Raises:
        ValueError: as `gated`; or a soft gate on a layer, which no weight can take.
    """
    network = network_in(model)
    tied = {id(layer.weight) for layer in network.embeddings} & {id(layer.weight) for layer in network.readers}
    for group in named_groups(model, gates):
        gate = checked_gate(group, gates[group.name])
        if group.unit == "layer" and ((gate != 0) & (gate != 1)).any():
            raise ValueError("A layer's gate is only folded if it is 0 or 1: no weight of a block scales all of it.")
        for place in group.places:
            layer: Any = place.module
            if place.at == "norm" and not (tied and layer is network.norms[-1]):  # a tied head has its gate already
                for p in layer.parameters(recurse=False):
                    p.mul_(gate.to(p))
            elif place.at == "input":
                scale = gate.to(layer.weight).repeat_interleave(place.width)
                layer.weight.mul_(scale[:, None] if is_transposed(layer) else scale)
            elif place.at == "output":
                layer.weight.mul_(gate.to(layer.weight) if is_transposed(layer) else gate.to(layer.weight)[:, None])
                if getattr(layer, "bias", None) is not None:
                    layer.bias.mul_(gate.to(layer.bias))


def checked_gate(group: Group, gate: Tensor) -> Tensor:
    """The gate, if it has the right shape."""
    if gate.shape != (group.size,):
        raise ValueError(
            f"{group.name!r} has {group.size} units; a gate of shape {tuple(gate.shape)} does not fit, give one of "
            f"shape ({group.size},)."
        )
    return gate


def named_groups(model: nn.Module, names: Mapping[str, Any]) -> list[Group]:
    """The groups of these names.

    Raises:
        ValueError: there is none of that name; lists near ones.
    """
    units = {name.rpartition("/")[2] for name in names} & set(UNITS)
    groups = {group.name: group for group in structure_of(model, cast("list[Unit]", sorted(units)))}
    for name in names:
        if name not in groups:
            known = [group.name for group in groups_of(network_in(model), UNITS)]
            raise ValueError(f"{name!r} is no group of units of this model. {near(name, known)}")
    return [group for name, group in groups.items() if name in names]


def _hook(place: Place, gate: Callable[[], Tensor]) -> RemovableHandle:
    module = place.module
    if place.at == "input":
        return module.register_forward_pre_hook(lambda _, args: (_times(args[0], gate(), place.width), *args[1:]))
    if place.at == "output":
        return module.register_forward_hook(lambda _, args, output: _times(output, gate()))
    if place.at == "norm":
        return module.register_forward_hook(lambda norm, args, output: _normed(norm, args[0], gate()).to(output.dtype))
    assert place.unit is not None
    unit = place.unit

    def share(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        g = gate()[unit].to(x.dtype)
        y = y * g + x * (1 - g)  # exactly y or x at the ends
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return module.register_forward_hook(share, with_kwargs=True)


def _times(x: Tensor, gate_U: Tensor, width: int = 1) -> Tensor:
    return x * gate_U.to(x.dtype).repeat_interleave(width)


def _normed(norm: Any, x_ND: Tensor, gate_D: Tensor) -> Tensor:
    """RMSNorm or LayerNorm over the channels whose gate is not 0, times the gate, in float32 or better."""
    x = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
    kept = (gate_D != 0).to(x.dtype)
    count = kept.sum()
    if isinstance(norm, nn.LayerNorm):
        x = (x - (x * kept).sum(-1, keepdim=True) / count) * kept
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    x = x * kept * torch.rsqrt((x * kept).square().sum(-1, keepdim=True) / count + eps)
    y = norm.weight * x.to(x_ND.dtype)
    y = y if getattr(norm, "bias", None) is None else y + norm.bias
    return y * gate_D.to(y.dtype)
