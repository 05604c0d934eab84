"""Sharded parameters (DTensor) and plain ones alike: this rank's part of a tensor, the whole of it, and of a module."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate


def local(tensor: Tensor) -> Tensor:
    """This rank's part; of a plain tensor, the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor that all ranks hold parts of; all of them must call this."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh_device = tensor.device_mesh.device_type
    # What was offloaded to the CPU is gathered where the mesh communicates.
    there: Any = tensor if tensor.device.type == mesh_device else tensor.to(mesh_device)
    return there.full_tensor()


def as_shard_of(part: Tensor, like: Tensor) -> Tensor:
    """What the ranks hold as ``part`` each, as one tensor that is sharded like ``like``."""
    if not isinstance(like, DTensor):
        return part
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def part_for(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a plain tensor that every rank holds whole, cut as ``like`` is; without communication."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements).to_local()


def is_sharded(module: nn.Module) -> bool:
    """Whether ranks hold parts of its parameters."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def flattens_weights(strategy: Any) -> str | None:
    """The name of a strategy that keeps weights in flat buffers of its own (DeepSpeed, FSDP1); None of any other.

    By name, since either of Lightning's two packages may be the one that runs.
    """
    return next(
        (k.__name__ for k in type(strategy).__mro__ if k.__name__ in ("DeepSpeedStrategy", "FSDPStrategy")), None
    )


def gathered(state: Any, keep: bool) -> Any:
    """A nest of dicts and lists with every tensor whole and on the CPU; all ranks must call this.

    Args:
        keep: whether this rank wants it; elsewhere the tensors are let go one by one, and None stands for them.
    """
    if isinstance(state, Tensor):
        tensor = whole(state.detach())
        return (tensor.cpu().clone() if tensor is state else tensor.cpu()) if keep else None
    if isinstance(state, Mapping):
        return type(state)((key, gathered(value, keep)) for key, value in state.items())  # type: ignore[call-arg]
    if isinstance(state, list | tuple):
        return type(state)(gathered(value, keep) for value in state)
    return state


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, cut and placed as ``like`` is; one of another shape (a count of steps) stays whole."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    part = part_for(tensor.to(like.device_mesh.device_type), like)
    return as_shard_of(part.to(like.to_local().device, copy=True), like)


def plain_copy(module: nn.Module, keep: bool = True) -> nn.Module | None:
    """An unsharded copy, with weights of its own and without hooks, for whoever wants a model that is whole.

    Everything but parameters, buffers and sub-modules is shared with the original. All ranks must call this.

    Args:
        keep: whether this rank wants it; elsewhere the weights are let go one by one, and None is returned.
    """
    if not keep:
        gathered([p.detach() for p in module.parameters()], keep=False)
        return None
    tensors: dict[int, Tensor] = {}

    def tensor_of(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in tensors:  # a tied weight is one again
            copied = whole(tensor.detach()).clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            tensors[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
        return tensors[id(tensor)]

    return _copy_with(module, tensor_of, {})


def _copy_with(module: nn.Module, tensor_of: Callable[[Any], Any], copies: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in copies:
        kind: Any = type(module)
        plain = kind.__mro__[2] if isinstance(module, FSDPModule) else kind  # FSDP2 puts a class of its own before it
        copy = copies[id(module)] = plain.__new__(plain)
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers"):
                value = {name: tensor_of(tensor) for name, tensor in value.items()}
            elif key == "_modules":
                value = {n: None if m is None else _copy_with(m, tensor_of, copies) for n, m in value.items()}
            elif isinstance(value, OrderedDict) and "hooks" in key:
                value = OrderedDict()
            if key != "forward":  # put on the object by activation checkpointing: bound to the original
                vars(copy)[key] = value
    return copies[id(module)]
