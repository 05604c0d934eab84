"""What several test files share: small modules that are not ours, runs that are killed and resumed, and comparing them.

Shape letters: N = examples, B = batch, T = tokens.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_slm.models import SLMConfig, SLMForCausalLM

VOCABULARY, WINDOW = 64, 8
# What Lightning leaves in the environment of a process that was one of several, or the only one.
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


def tiny_slm(tied: bool = True) -> SLMForCausalLM:
    """A model of ours, 96 x 64, in evaluation mode."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    return SLMForCausalLM(SLMConfig(**sizes, **heads, pattern="attn/mlp*2")).eval()


def tiny_llama(tied: bool = True) -> transformers.LlamaForCausalLM:
    """Hugging Face's, of the same sizes."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 2, "num_hidden_layers": 2, "tie_word_embeddings": tied}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()


def batches(
    pairs: bool = False, n: int = 32, batch_size: int = 2, part: slice = slice(None), words: int = VOCABULARY
) -> StatefulDataLoader:
    """The same random tokens every time, as dicts of ``input_ids`` and ``labels`` or as (inputs, target) pairs.

    Args:
        part: the examples of one rank.
        words: how many tokens there are; that there are few can be learned in twenty steps.
    """
    ids_NT = torch.randint(words, (n, WINDOW + 1), generator=torch.Generator().manual_seed(7))[part]
    if pairs:
        return StatefulDataLoader([(ids[:-1], ids[1:]) for ids in ids_NT], batch_size=batch_size)
    return StatefulDataLoader([{"input_ids": ids[1:], "labels": ids[1:]} for ids in ids_NT], batch_size=batch_size)


class Demo(LightningTransformer):
    """Lightning's demo, small, with all stages; its batches are pairs and its output log-probabilities (B * T, V)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(VOCABULARY)
        self.model = Transformer(VOCABULARY, ninp=32, nhead=2, nhid=64, nlayers=1, dropout=dropout)

    def prepare_data(self) -> None:
        """The demo's own would download."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.training:
            self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))  # as many do

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD: Adam would make steps of the rounding noise that is the gradient of a key's bias."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class ForeignLlama(LightningModule):
    """A Hugging Face model in ten lines of someone else's."""

    def __init__(self, hidden: int = 32, layers: int = 2) -> None:
        super().__init__()
        sizes = {"vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": 2 * hidden}
        heads = {"num_attention_heads": 2, "num_hidden_layers": layers, "tie_word_embeddings": True}
        self.net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss = self.net(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.log("val_loss", self.net(**batch).loss)

    def test_step(self, batch: dict[str, Tensor]) -> None:
        self.log("test_loss", self.net(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class GivenBatches(LightningDataModule):
    """These very batches, in order, for every stage; with further attributes, as data of ours has them."""

    def __init__(self, given: list[Any], **attributes: Any) -> None:
        super().__init__()
        self.given = given
        vars(self).update(attributes)

    def train_dataloader(self) -> StatefulDataLoader:
        return StatefulDataLoader(self.given, batch_size=None)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Notes(Logger):
    """Keeps what was logged: ``steps[step][name]``."""

    name, version = "notes", 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.steps.setdefault(step or 0, {}).update(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Not needed here."""


class Killed(Exception):
    """The run was killed."""


class SaveAndDie(Checkpoint):
    """Saves after some optimizer steps and ends the run by an exception one step later, as a power cut would."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step, self.saved = path, step, False

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and not self.saved:  # once, if a step has several batches
            trainer.save_checkpoint(self.path)
            self.saved = True
        elif trainer.global_step > self.step:
            raise Killed


class DropoutOfTheStep(Callback):
    """Makes random numbers a function of the step: Lightning does not save the generators' state."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        # Not torch.manual_seed: where there is no GPU, it notes down the whole stack each time, for CUDA's later use.
        torch.default_generator.manual_seed(1000 + batch_idx + trainer.global_rank)


def trainer(folder: Path, callbacks: Any = (), steps: int = 8, plugin: Any = None, **kwargs: Any) -> Trainer:
    """A quiet Trainer on the CPU, for a run of ``steps`` optimizer steps.

    Args:
        plugin: makes a precision plugin; each Trainer wants one of its own.
    """
    if plugin is not None:
        kwargs["plugins"] = [plugin()]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "logger": False,
        "log_every_n_steps": 1,
        **quiet,
    }
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**settings, **kwargs})


def checkpoint(run: Trainer, name: str = "end.ckpt") -> dict[str, Any]:
    """Everything the run would save now."""
    path = Path(run.default_root_dir) / name
    run.save_checkpoint(path)
    return torch.load(path, weights_only=True)


def kill_and_resume(
    make_module: Callable[[], Any],
    make_callbacks: Callable[[], list[Any]],
    folder: Path,
    loader: Callable[[], Any] = batches,
    saved_at: int = 5,
    **kwargs: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last checkpoints of a run that nothing happened to, and of one killed after its last save and resumed.

    Each holds under "notes" what it logged from the save on. The module is made with another seed for the resumed
    run: nothing may come from there.
    """
    ends = []
    for part in ("straight", "killed", "resumed"):
        torch.manual_seed(1 if part == "resumed" else 0)
        notes, module, callbacks = Notes(), make_module(), [*make_callbacks(), DropoutOfTheStep()]
        if part == "killed":
            death = SaveAndDie(folder / "saved.ckpt", saved_at)
            run = trainer(folder, [*callbacks, death], **{**kwargs, "enable_checkpointing": True})
            with pytest.raises(Killed):
                run.fit(module, loader(), loader())
            continue
        run = trainer(folder, callbacks, logger=notes, **kwargs)
        run.fit(module, loader(), loader(), ckpt_path=folder / "saved.ckpt" if part == "resumed" else None)
        later = {step: values for step, values in notes.steps.items() if step >= saved_at}
        ends.append({**checkpoint(run), "notes": later})
    return ends[0], ends[1]


def run_on_ranks(script: Path, *arguments: Any, timeout: int) -> str:
    """Run a script whose Trainer starts further processes; returns what it printed. None is left behind."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    for name in RENDEZVOUS:
        environment.pop(name, None)
    with tempfile.TemporaryFile("w+") as log:
        job = [sys.executable, str(script), *map(str, arguments)]
        process = subprocess.Popen(job, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the other ranks too
        log.seek(0)
        text = log.read()
    assert code == 0, text[-4000:]
    return text


def leave_together() -> None:
    """The last line of a script with several ranks: who leaves first breaks the others off.

    At once, for threads of gloo that are left to the end of the interpreter may abort there, and the ranks' tests are
    about what they did before.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def on_two_ranks(body: str, folder: Path) -> None:
    """Run ``body`` in two processes that are ranks of a gloo group; it finds ``rank`` and a ``mesh`` of both."""
    script = folder / "ranks.py"
    script.write_text(_BEFORE + textwrap.dedent(body) + _AFTER)
    ranks = [subprocess.Popen([sys.executable, script, str(r), folder / "store"]) for r in range(2)]
    try:
        assert [process.wait(timeout=240) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()


_BEFORE = """
import sys
import torch
from torch.distributed.device_mesh import init_device_mesh
rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
"""
_AFTER = """
import os
torch.distributed.barrier()
os._exit(0)  # as `leave_together`
"""


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two nests of plain values and tensors are not equal bit for bit; empty where they are."""
    if isinstance(a, dict) and isinstance(b, dict):
        lacking = [f"{at}/{key} is on one side only" for key in a.keys() ^ b.keys()]
        return lacking + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{at}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{at}: {len(a)} and {len(b)} entries"]
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{at}/{i}")]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [f"{at}: {a.flatten()[:4].tolist()}... and {b.flatten()[:4].tolist()}..."]
    same = a == b or (a != a and b != b)
    return [] if same else [f"{at}: {a} and {b}"]


def learned(end: dict[str, Any]) -> dict[str, Any]:
    """What of a checkpoint must not depend on how the run got there."""
    return {key: end[key] for key in ("state_dict", "optimizer_states", "callbacks", "notes") if key in end}
