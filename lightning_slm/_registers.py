"""``import lightning_slm`` is enough for transformers to load our models and packed folders, and for Lightning to know
our strategies by name; it imports none of them.

Transformers looks up model types and quantisation methods in two tables, Lightning strategies in one. When, and if, the
modules that hold them are imported, our entries are added; what they stand for is imported when it is looked up.
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _OnDemand(dict[str, Any]):
    """Model types registered from outside; ``slm`` is among them, and is imported when it is asked for."""

    def __getitem__(self, key: str) -> Any:
        if key == "slm" and super().__getitem__(key) is None:
            import_module("lightning_slm.models")  # registers itself, and so replaces the None
        return super().__getitem__(key)

    def values(self) -> Any:
        return [self[key] for key in self]

    def items(self) -> Any:
        return [(key, self[key]) for key in self]


def _add_model_type(module: Any) -> None:
    table = module.CONFIG_MAPPING
    table._extra_content = _OnDemand({"slm": None, **table._extra_content})


def _add_quantization(module: Any) -> None:
    import_module("lightning_slm.quantization.hf")


def _add_strategies(module: Any) -> None:
    for name, kind in {"slm_fsdp2": "FSDP2Strategy", "slm_zero1": "ZeRO1Strategy"}.items():
        if name not in module.StrategyRegistry:
            module.StrategyRegistry.register(name, partial(_strategy, kind), description=f"lightning_slm's {kind}")


def _strategy(kind: str, **options: Any) -> Any:
    return getattr(import_module("lightning_slm.strategies"), kind)(**options)


_WHEN_IMPORTED: dict[str, Callable[[Any], None]] = {
    "transformers.models.auto.configuration_auto": _add_model_type,
    "transformers.quantizers.auto": _add_quantization,
    "lightning.pytorch.strategies": _add_strategies,
}


class _Finder(MetaPathFinder):
    """Lets Python find the module, and adds our entries after it has run."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        add = _WHEN_IMPORTED.get(name)
        spec = PathFinder.find_spec(name, path, target) if add else None
        if add is None or spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_add(module: ModuleType) -> None:
            run(module)
            add(module)

        spec.loader.exec_module = run_and_add  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Add our entries: now where the tables exist already, else when they do."""
    for name, add in _WHEN_IMPORTED.items():
        if name in sys.modules:
            add(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
