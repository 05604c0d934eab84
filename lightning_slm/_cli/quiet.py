"""What other packages say that no user of the command line can act on."""

import logging
import re
import warnings

_NOISE = re.compile(r"Tip: |`weights_only` was not set|[GT]PU available: False|Failed to load /|register_constant\(\)")
_WARNINGS = (r".*isinstance\(treespec, LeafSpec\)", r"Precision .* is not supported by the model summary")


class _NotNoise(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not _NOISE.search(record.getMessage())


_FILTER = _NotNoise()


def quieten() -> None:
    """Silence advertisements and import-time complaints of optional extensions; only ever called by the program."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.connectors.checkpoint_connector"):
        logging.getLogger(name).addFilter(_FILTER)
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
