"""FSDP2 around any model: its repeated blocks one by one, then the rest (Zhao et al. 2023,
https://arxiv.org/abs/2304.11277; ZeRO: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint


def shard_(
    root: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    zero_stage: int = 3,
    prepare: Callable[[nn.Module], object] = lambda part: None,
    **options: Any,
) -> None:
    """Shard ``blocks``, then what is left of ``root``, over ``mesh``, in place; parameters become DTensors.

    All ranks begin with the weights of the first. What lies on the meta device gets its first weights here, a block
    at a time: never are more than the shards and one block whole on a rank.

    Args:
        blocks: inner ones may stand among outer ones.
        mesh: one dimension, or two (replicas, shards).
        zero_stage: 3: a block is gathered for its forward and again for its backward pass; 2: gathered weights are
            kept in between.
        prepare: called with each part when it has its weights, before it is sharded.
        options: of ``torch.distributed.fsdp.fully_shard``.
    """
    again = zero_stage == 3 and mesh.size(-1) > 1  # in one process a second gathering is only a second copy
    for block in sorted(blocks, key=lambda block: sum(1 for _ in block.modules())):  # inner ones first
        _alike_(block, root, mesh)
        prepare(block)
        fully_shard(block, mesh=mesh, reshard_after_forward=again, **options)
    _alike_(root, root, mesh)
    prepare(root)
    fully_shard(root, mesh=mesh, reshard_after_forward=False, **options)  # its backward pass begins at once


def shard_blocks_(blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Shard ``blocks`` only, each on its own: for a frozen model whose parts are called one by one."""
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)


def checkpoint_activations_(root: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Keep only the inputs of each block and compute the rest again in the backward pass (Chen et al. 2016,
    https://arxiv.org/abs/1604.06174), in place.

    A Hugging Face model does so by its own switch, which also keeps caches out; other blocks get a forward around
    theirs. State-dict keys stay.
    """
    inside: set[int] = set()
    for module in root.modules():
        if getattr(module, "supports_gradient_checkpointing", False) and id(module) not in inside:
            switch: Any = module
            switch.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            inside |= {id(child) for child in module.modules()}
    for block in blocks:
        if id(block) not in inside and "forward" not in vars(block):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def initialize_(module: nn.Module, root: nn.Module, device: torch.device) -> None:
    """Give what lies on the meta device in ``module``, a part of ``root``, memory and its first weights.

    Hugging Face models are initialised by their own rule, other modules by ``reset_parameters``; tied weights stay
    tied.

    Raises:
        ValueError: a parameter or buffer that neither of them fills.
    """
    owners = {id(m): owner for owner in root.modules() if hasattr(owner, "_init_weights") for m in owner.modules()}
    names = {id(m): name for name, m in root.named_modules()}
    for part in _materialized(module, device):
        owner: Any = owners.get(id(part))
        if owner is not None:
            with torch.no_grad():
                owner._init_weights(part)
        elif hasattr(part, "reset_parameters"):
            part.reset_parameters()  # type: ignore[operator]
        for key, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if tensor.is_floating_point() and tensor.isnan().any():
                raise ValueError(
                    f"'{names[id(part)]}.{key}' of {type(part).__name__} was built on the meta device, and nothing "
                    "gives it its first values: define reset_parameters() there, or build the model without meta_init."
                )


def _materialized(module: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """The parts whose tensors have just got memory, filled with NaN, so that what is forgotten is seen."""
    made: dict[int, Tensor] = {}

    def with_memory(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 0, device=device)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, tensor.requires_grad)
                vars(new).update(vars(tensor))
            made[id(tensor)] = new
        return made[id(tensor)]

    for part in module.modules():
        found = False
        places: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in places:
            for key, tensor in tensors.items():
                if tensor is not None and (tensor.is_meta or id(tensor) in made):
                    tensors[key], found = with_memory(tensor), True
        if found:
            yield part


def _alike_(module: nn.Module, root: nn.Module, mesh: DeviceMesh) -> None:
    """First weights where there are none, and those of the first rank on all."""
    device = torch.device(mesh.device_type)  # of a GPU the current one
    if any(p.is_meta for p in module.parameters()):
        initialize_(module, root, device)
    if mesh.size() > 1:
        for tensor in {id(t): t for t in [*module.parameters(), *module.buffers()]}.values():
            if not hasattr(tensor, "device_mesh"):  # a block inside is done
                there = tensor.data.to(device)
                dist.broadcast(there, 0)
                tensor.data.copy_(there)
