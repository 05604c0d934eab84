"""The new weights of blocks that are finished: in a folder, so that a later calibration goes on after them."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_slm.calibration.statistics import over_ranks
from lightning_slm.nn.sharded import whole


class Finished:
    """What a calibration that is killed need not do again, if there is a folder.

    A block counts as finished where all ranks have it.

    Args:
        folder: where it is kept; None: nowhere.
        weights: those to compress, by block and name; with a folder all ranks must call this.
        about: what is done to them, as plain values.

    Raises:
        ValueError: the folder is of another model, or of something else that is done to it; or a file is broken.
    """

    def __init__(
        self, folder: str | Path | None, weights: Mapping[str, Mapping[str, Tensor]], about: Mapping[str, Any]
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self._number = {name: i for i, name in enumerate(weights)}
        self._done: set[str] = set()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._compare(weights, json.loads(json.dumps(about)))
            self._done = set.intersection(*over_ranks({name for name in weights if self._path(name).exists()}))

    def __contains__(self, block: str) -> bool:
        return block in self._done

    def keep(self, block: str, new: Mapping[str, Tensor]) -> None:
        """Write a block's new weights down."""
        if self.folder is not None:
            tensors = {name: tensor.contiguous().cpu() for name, tensor in new.items()}
            _written(self._path(block), lambda to: save_file(tensors, to))

    def weights(self, block: str) -> Mapping[str, Tensor]:
        """The new weights of a finished block."""
        path = self._path(block)
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and its block will be done again.") from error

    def _path(self, block: str) -> Path:
        assert self.folder is not None
        return self.folder / f"block_{self._number[block]}.safetensors"

    def _compare(self, weights: Mapping[str, Mapping[str, Tensor]], about: Any) -> None:
        """A model that an earlier call left half compressed is the same model: its finished blocks are skipped."""
        assert self.folder is not None
        path = self.folder / "about.json"
        sums = {block: {name: _checksum(weight) for name, weight in of.items()} for block, of in weights.items()}
        # Another rank may be just writing the same; each decides by what it finds, and must find the same.
        known = over_ranks(_read(path) if path.exists() else None)[0]
        if known is None:
            _written(path, lambda to: to.write_text(json.dumps({"about": about, "weights": sums}, indent=1)))
            return
        if known["about"] != about:
            raise ValueError(
                f"{self.folder} holds blocks to which something else was done: {known['about']}, and now {about}; "
                "choose an empty folder."
            )
        old = known["weights"]
        if list(old) != list(sums) or not all(self._is_known(block, sums[block], old[block]) for block in sums):
            raise ValueError(f"{self.folder} holds blocks of another model or other targets; choose an empty folder.")

    def _is_known(self, block: str, sums: Mapping[str, str], old: Mapping[str, str]) -> bool:
        """Whether a block's weights are those that were to be compressed, or what became of them."""
        if sums == old:
            return True
        if sums.keys() != old.keys() or not self._path(block).exists():
            return False
        new = {name: {_checksum(weight), _checksum(weight.T)} for name, weight in self.weights(block).items()}
        return all(value == old[name] or value in new.get(name, ()) for name, value in sums.items())


def _checksum(weight: Tensor) -> str:
    plain = whole(weight.detach()).contiguous().cpu()
    return hashlib.blake2b(plain.view(-1).view(torch.uint8).numpy(), digest_size=16).hexdigest()  # type: ignore[arg-type]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); delete its folder, and calibration begins anew.") from error


def _written(path: Path, write: Callable[[Path], Any]) -> None:
    """Under a temporary name first: a killed process leaves no half file."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    write(temporary)
    temporary.replace(path)
