"""Where a run keeps what, so that a run folder can stand for its last checkpoint."""

from pathlib import Path

CONFIG, LAST = "config.yaml", Path("checkpoints") / "last.ckpt"


def last_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: the file itself, or the last one of a run folder."""
    return path / LAST if path.is_dir() else path


def run_folder_of(checkpoint: Path) -> Path | None:
    """The run folder a checkpoint lies in, if it was written by ``lightning-slm fit``."""
    folder = checkpoint.parent.parent
    return folder if (folder / CONFIG).is_file() else None
