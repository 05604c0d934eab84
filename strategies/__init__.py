"""Sharding strategies and precision plugins (none yet: Lightning's own DDP and precisions are what is tested)."""

__all__: list[str] = []

if __name__ != "lightning_slm.strategies":
    raise ImportError("import lightning_slm.strategies, not strategies: a second copy of every class would be made")
