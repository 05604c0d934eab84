"""The repeated blocks of a model: what is compiled, checkpointed, sharded and calibrated one by one."""

from collections import Counter
from fnmatch import fnmatchcase

from torch import nn

from lightning_slm.errors import near
from lightning_slm.nn.targets import Patterns, as_list


def repeated_blocks(model: nn.Module, names: Patterns = "auto") -> list[tuple[str, nn.Module]]:
    """The blocks of ``model`` and their names, in order.

    Args:
        model: any module.
        names: "auto": the members of the outermost ``nn.ModuleList`` (if there is none, ``nn.Sequential``) that share
            their class with a neighbour; or fnmatch patterns of module names.

    Returns: none, if "auto" finds none.

    Raises:
        ValueError: a pattern that matches no module; lists near names.

    >>> model = nn.ModuleDict({"body": nn.ModuleList(nn.Linear(2, 2) for _ in range(2)), "head": nn.Linear(2, 2)})
    >>> [name for name, _ in repeated_blocks(model)], [name for name, _ in repeated_blocks(model, "head")]
    (['body.0', 'body.1'], ['head'])
    """
    modules = [(name, module) for name, module in model.named_modules() if name]
    if names == "auto":
        return _repeated(modules, nn.ModuleList) or _repeated([("", model), *modules], nn.Sequential)
    for pattern in as_list(names):
        if not any(fnmatchcase(name, pattern) for name, _ in modules):
            known = [name for name, _ in modules]
            known += [name.rpartition(".")[2] for name in known]  # "layer" is nearer to "layers" than to its whole path
            raise ValueError(f"blocks={pattern!r} matches no module. {near(pattern.strip('*'), known)}")
    return [(name, module) for name, module in modules if any(fnmatchcase(name, p) for p in as_list(names))]


def _repeated(modules: list[tuple[str, nn.Module]], kind: type[nn.Module]) -> list[tuple[str, nn.Module]]:
    found, inside = [], set[int]()
    for name, module in modules:  # parents come before their children
        if isinstance(module, kind) and getattr(module, "are_blocks", True) and id(module) not in inside:
            inside |= {id(child) for child in module.modules()}
            members = [(f"{name}.{key}".lstrip("."), child) for key, child in module.named_children()]
            classes = Counter(type(child) for _, child in members)
            found += [(n, child) for n, child in members if classes[type(child)] > 1 and _has_weights(child)]
    return found


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
