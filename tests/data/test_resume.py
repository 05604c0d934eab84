"""A run that is killed and resumed sees exactly the batches it would have seen: asked of Lightning itself."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_slm.data import TextData

# A resumed run needs no checkpoints of its own here.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
PER_EPOCH = 6  # training batches, by limit_train_batches; the corpus has more


class Recorder(LightningModule):
    """Writes down the ids of every batch, also across processes that are killed."""

    def __init__(self, file: Path, kill_at: int | None = None, kill_in: str = "training_step") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.file, self.kill_at, self.kill_in = file, kill_at, kill_in

    def training_step(self, batch, batch_idx):
        self._die("training_step")
        with Path(f"{self.file}.{self.global_rank}").open("a") as stream:
            stream.write(f"{self.current_epoch}/{batch_idx} {batch['input_ids'].tolist()}\n")
        return self.weight * 0

    def on_train_batch_end(self, *_):
        self._die("on_train_batch_end", 1)

    def validation_step(self, batch, batch_idx):
        self._die("validation_step")

    def _die(self, place, offset=0):
        if self.kill_in == place and self.kill_at is not None and self.global_step - offset == self.kill_at:
            raise InterruptedError

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class SavesWhenStopped(Callback):
    """As for Ctrl-C: within a step, whose batch was fetched but not trained on."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.file)


def data(corpus, cache, **kwargs):
    sizes = {"vocab_size": 300, "window": 16, "batch_size": 2, "val_fraction": 0.2}
    return TextData(corpus, **{**sizes, "cache_dir": cache, **kwargs})


def fit(module, text, folder, ckpt_path=None, callbacks: list[Callback] | None = None, **kwargs):
    if callbacks is None:
        callbacks = [ModelCheckpoint(folder / "steps", "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)]
        callbacks[0].CHECKPOINT_EQUALS_CHAR = "-"
    trainer = Trainer(
        **{"max_epochs": 3, "limit_train_batches": PER_EPOCH, "limit_val_batches": 1, **kwargs},
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=callbacks,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )  # fmt: skip
    trainer.fit(module, text, ckpt_path=ckpt_path)
    return trainer


def resume(file, text, ckpt_path, **kwargs):
    fit(Recorder(file), text, file.parent, ckpt_path, callbacks=[], **kwargs)


def batches(file, rank=0):
    return Path(f"{file}.{rank}").read_text().splitlines()


@pytest.fixture
def unkilled(corpus, tmp_path):
    fit(Recorder(tmp_path / "unkilled"), data(corpus, tmp_path / "cache"), tmp_path / "unkilled_run")
    lines = batches(tmp_path / "unkilled")
    assert len(lines) == len({line.split(maxsplit=1)[1] for line in lines}) == 3 * PER_EPOCH  # every batch is another
    return lines


@pytest.mark.parametrize("workers", [0, 2])
def test_every_step_of_a_run_can_be_the_last_before_it_is_resumed(workers, unkilled, corpus, tmp_path):
    for step in (1, PER_EPOCH - 1, PER_EPOCH, PER_EPOCH + 1, 2 * PER_EPOCH, 2 * PER_EPOCH + 3):
        text = data(corpus, tmp_path / "cache", num_workers=workers)
        resume(tmp_path / f"{step}", text, tmp_path / f"unkilled_run/steps/step-{step}.ckpt")
        assert batches(tmp_path / f"{step}") == unkilled[step:], f"resumed after step {step}"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("place", "step"), [("training_step", 9), ("on_train_batch_end", 8), ("validation_step", 6)])
def test_a_run_that_fails_goes_on_from_its_last_checkpoint(place, step, workers, unkilled, corpus, tmp_path):
    file, run = tmp_path / "killed", tmp_path / "killed_run"
    with pytest.raises(InterruptedError):
        fit(Recorder(file, step, place), data(corpus, tmp_path / "cache", num_workers=workers), run)
    fit(Recorder(file), data(corpus, tmp_path / "cache", num_workers=workers), run, run / "steps" / "last.ckpt")
    assert batches(file) == unkilled


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_that_is_interrupted_and_saved_is_done_again(workers, unkilled, corpus, tmp_path):
    file, text = tmp_path / "killed", data(corpus, tmp_path / "cache", num_workers=workers)
    with pytest.raises(InterruptedError):
        fit(Recorder(file, 9), text, tmp_path, callbacks=[SavesWhenStopped(tmp_path / "interrupted.ckpt")])
    text = data(corpus, tmp_path / "cache", num_workers=workers)
    resume(file, text, tmp_path / "interrupted.ckpt")
    assert batches(file) == unkilled


@pytest.mark.parametrize("checkpoint", ["each epoch", "each validation"])
def test_a_run_resumed_at_the_end_of_an_epoch_begins_the_next(checkpoint, unkilled, corpus, tmp_path):
    on_epoch = checkpoint == "each epoch"
    for epochs in (1, 2):
        save = ModelCheckpoint(tmp_path / f"{epochs}", "end", every_n_epochs=1, save_on_train_epoch_end=on_epoch)
        text = data(corpus, tmp_path / "cache")
        fit(Recorder(tmp_path / "before"), text, tmp_path, callbacks=[save], max_epochs=epochs)
        (tmp_path / "after.0").unlink(missing_ok=True)
        fit(
            Recorder(tmp_path / "after"), data(corpus, tmp_path / "cache"), tmp_path, save.best_model_path, callbacks=[]
        )
        assert batches(tmp_path / "after") == unkilled[epochs * PER_EPOCH :]


def test_whole_epochs_resume_as_limited_ones_do(corpus, tmp_path):
    text = data(corpus, tmp_path / "cache", batch_size=16)
    whole = {"limit_train_batches": 1.0, "max_epochs": 2}
    fit(Recorder(tmp_path / "unkilled"), text, tmp_path / "run", **whole)
    expected, per_epoch = batches(tmp_path / "unkilled"), len(text.train_dataloader())
    assert len(expected) == 2 * per_epoch > 6
    for step in (1, per_epoch, per_epoch + 1):
        again = data(corpus, tmp_path / "cache", batch_size=16)
        resume(tmp_path / f"{step}", again, tmp_path / f"run/steps/step-{step}.ckpt", **whole)
        assert batches(tmp_path / f"{step}") == expected[step:]


def test_a_state_is_a_place_in_plain_numbers_that_other_workers_can_take_up(unkilled, corpus, tmp_path):
    checkpoint = torch.load(tmp_path / "unkilled_run/steps/step-8.ckpt", weights_only=True)
    (state,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert (state["epoch"], state["windows"], state["seed"]) == (1, 4, 0)
    assert {type(value) for value in state.values()} == {int, str}


@pytest.mark.parametrize("other", [{"window": 8}, {"seed": 1}, {"vocab_size": 280}])
def test_a_checkpoint_of_other_data_is_refused(other, unkilled, corpus, tmp_path):
    text = data(corpus, tmp_path / "cache", **other)
    with pytest.raises(ValueError, match="The checkpoint stopped within other data"):
        resume(tmp_path / "x", text, tmp_path / "unkilled_run/steps/step-8.ckpt")


def python(tmp_path, code, *arguments, **kwargs):
    """Run code in a process of its own, with this file's names."""
    module = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_resume import *\n"
    (tmp_path / "script.py").write_text(module + "if __name__ == '__main__':\n" + code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "script.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, **kwargs)


TWO_RANKS = """
    corpus, folder = map(Path, sys.argv[1:])
    run = dict(devices=2, strategy="ddp")
    fit(Recorder(folder / "unkilled"), data(corpus, folder / "cache"), folder / "run", **run)
    for step, workers in ((2, 0), (6, 0), (9, 2)):
        text = data(corpus, folder / "cache", num_workers=workers)
        resume(folder / f"{step}", text, folder / f"run/steps/step-{step}.ckpt", **run)
"""


@pytest.mark.slow
def test_two_ranks_resume_exactly_and_see_what_one_would(corpus, tmp_path):
    done = python(tmp_path, TWO_RANKS, corpus, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [batches(tmp_path / "unkilled", rank) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == 3 * PER_EPOCH
    for step in (2, 6, 9):
        assert [batches(tmp_path / f"{step}", rank) for rank in range(2)] == [rank[step:] for rank in ranks]
    fit(Recorder(tmp_path / "one"), data(corpus, tmp_path / "cache", batch_size=4), tmp_path, callbacks=[])
    together = [f"{a[:-1]}, {b.split(maxsplit=1)[1][1:]}" for a, b in zip(*ranks)]
    assert batches(tmp_path / "one") == together  # one rank with twice the batch


KILLED = """
    corpus, folder = map(Path, sys.argv[1:])
    class Killed(Recorder):
        def on_train_batch_end(self, *_):
            if self.global_step == 9:
                os.kill(os.getpid(), signal.SIGKILL)
    fit(Killed(folder / "killed"), data(corpus, folder / "cache"), folder / "killed_run")
"""


@pytest.mark.slow
def test_a_run_killed_without_warning_goes_on_from_its_last_checkpoint(unkilled, corpus, tmp_path):
    assert python(tmp_path, KILLED, corpus, tmp_path).returncode == -signal.SIGKILL
    last = tmp_path / "killed_run" / "steps" / "last.ckpt"
    resume(tmp_path / "resumed", data(corpus, tmp_path / "cache"), last)
    assert batches(tmp_path / "killed") == unkilled[:9]
    assert batches(tmp_path / "resumed") == unkilled[9:]
