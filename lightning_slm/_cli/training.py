"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI with our classes as defaults and helpful errors."""

import re
import warnings
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.utils.logging import disable_progress_bar

from lightning_slm._cli import UserError, packaged
from lightning_slm._cli.budget import PROBE, Stopwatch, steps_of_run, steps_that_fit
from lightning_slm._cli.paths import CONFIG, LAST, last_checkpoint, run_folder_of
from lightning_slm._cli.progress import StepProgressBar
from lightning_slm._cli.run_folder import LastCheckpoint, SaveConfig
from lightning_slm.errors import near

# Which module wrote a checkpoint, by the task that it notes there.
_MODULES = {
    "causal": "lightning_slm.CausalLM",
    "masked": "lightning_slm.MaskedLM",
    "classification": "lightning_slm.SequenceClassifier",
}
# Short names on the command line are those of classes already imported.
_PUBLIC = ("callbacks", "data", "models", "modules", "strategies")
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_UNKNOWN_KEY = re.compile(r"[Oo]ption '([^']+)'|unrecognized arguments: (\S+)")
_EXPLAINED = re.compile(r"^ *- (.*Near names: .*|.*There are: .*)", re.MULTILINE)
_UNION = re.compile(r"Errors:\n(.*)\n *Given value type:", re.DOTALL)
_ALTERNATIVE = re.compile(r" *- Expected a <class 'NoneType'>\n?")


def run(command: str, args: list[str]) -> None:
    """Run one of Lightning's subcommands; ``args`` name files, not recipes."""
    disable_progress_bar()  # of loading weights; a run has a bar of its own
    for package in _PUBLIC:
        import_module(f"lightning_slm.{package}")
    SLMCLI(command, ["--help" if arg == "--help-all" else arg for arg in args])


class Parser(LightningArgumentParser):
    """A parser whose errors say what is near, without the list of types that were tried."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if found := _UNKNOWN_CLASS.search(message):
            raise UserError(f"there is no class {found[1]!r}. {near(found[1], _class_names())}")
        if found := _EXPLAINED.search(message):  # by the parser of one class's arguments, in whose name this one speaks
            raise UserError(f"{message.partition(':')[0]}: {found[1]}")
        if found := _UNKNOWN_KEY.search(message):
            given = (found[1] or found[2]).lstrip("-").partition("=")[0]
            raise UserError(f"{message}. {near(given, self._keys())}")
        raise UserError(_without_alternatives(message))

    def _keys(self) -> list[str]:
        parsers = [self, *(self._subcommands_action.choices.values() if self._subcommands_action else ())]
        keys = [action.dest for parser in parsers for action in parser._actions]
        return [key for key in keys if not key.endswith("help")]


def _without_alternatives(message: str) -> str:
    """The errors of a union of types, without the complaint that the value is not None."""
    found = _UNION.search(message)
    return _ALTERNATIVE.sub("", found[1]).strip(" -\n") if found else message


def _class_names() -> list[str]:
    def below(base: Any) -> Iterable[type]:
        for sub in base.__subclasses__():
            yield sub
            yield from below(sub)

    bases = (LightningModule, LightningDataModule, Callback, Optimizer, LRScheduler)
    return sorted({sub.__name__ for base in bases for sub in below(base) if not sub.__name__.startswith("_")})


class SLMCLI(LightningCLI):
    """LightningCLI for one subcommand.

    Differs from Lightning's: any LightningModule and data module, ours by default; optimizers are made by the module
    when it is complete; what the user writes wins over what a checkpoint remembers; every run has a folder.
    """

    def __init__(self, command: str, args: list[str]) -> None:
        self._command, self._args = command, args
        super().__init__(
            args=[command, *_with_config_of_checkpoint(args)],
            parser_class=Parser,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            auto_configure_optimizers=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the one that was asked for: each costs a parser of the whole Trainer."""
        return {self._command: LightningCLI.subcommands()[self._command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"model": {"class_path": "lightning_slm.CausalLM"}})
        parser.set_defaults({"data": {"class_path": "lightning_slm.TextData"}})
        if self._command == "fit":
            parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
            parser.add_argument(
                "--minutes",
                type=float | None,
                help="Train for about so long: as many steps as fit, timed first; instead of trainer.max_steps.",
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)  # Lightning's own warns where sys.argv is what we were called with

    def _parse_ckpt_path(self) -> None:
        """Lightning lets the checkpoint's hyperparameters override explicit flags; here they come first instead."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self._command]
        checkpoint = config.get("ckpt_path")
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = str(_default_folder(self._args, checkpoint))
        folder = Path(config.trainer.default_root_dir)
        if config.trainer.logger is None:
            init_args = {"save_dir": str(folder), "name": "logs"}
            config.trainer.logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": init_args}
        if config.get("minutes") is not None:
            kept = steps_of_run(folder) if checkpoint == "last" else None
            config.trainer.max_steps = kept or steps_that_fit(config.minutes, self._probe)
            self._set_seed()  # again: the run must not depend on how long the timing took

    def _probe(self, watch: Stopwatch, folder: str) -> None:
        _Probe(self._command, [*self._args, "--trainer.default_root_dir", folder], watch)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise UserError(_without_alternatives(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self._command].trainer
        if self._command == "fit" and config.enable_checkpointing is False:
            self._parser(self._command).callback_keys.remove("checkpoint")
        callbacks = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        callbacks = [callback for callback in callbacks if callback is not None]
        if config.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(StepProgressBar())
        return super().instantiate_trainer(**{"callbacks": callbacks, **kwargs})

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if kwargs.get("ckpt_path") == "last":
            last = Path(self.trainer.default_root_dir) / LAST
            kwargs["ckpt_path"] = last if last.is_file() else None
        elif kwargs.get("ckpt_path") is not None:
            kwargs["ckpt_path"] = last_checkpoint(Path(kwargs["ckpt_path"]))
        return kwargs


class _Probe(SLMCLI):
    """The same run in a folder to throw away, until the stopwatch stops it."""

    def __init__(self, command: str, args: list[str], watch: Stopwatch) -> None:
        self._watch = watch
        super().__init__(command, args)

    def before_instantiate_classes(self) -> None:
        config = self.config[self._command]
        config.minutes = None
        for key, value in PROBE.items():
            config.trainer[key] = value
        callbacks = config.trainer.callbacks
        if isinstance(callbacks, list):
            config.trainer.callbacks = [c for c in callbacks if not c.class_path.endswith("CompressionReport")]
        super().before_instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(self._watch)  # type: ignore[attr-defined]
        return trainer

    def fit(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of callbacks whose run is cut short
            self.trainer.fit(*args, **kwargs)


def _default_folder(args: list[str], checkpoint: str | None) -> Path:
    """``runs/`` and the names of the configurations; evaluation goes to the folder of the run it evaluates."""
    if checkpoint and checkpoint != "last" and (run := run_folder_of(last_checkpoint(Path(checkpoint)))):
        return run
    names = [path.stem for path in packaged.configs_in(args)]
    return Path("runs") / ("+".join(names) or "run")


def _with_config_of_checkpoint(args: list[str]) -> list[str]:
    """Without a ``--config`` of its own, a command on a checkpoint starts from the configuration of that run."""
    pairs = dict(zip(args, [*args[1:], ""]))
    given = pairs.get("--ckpt_path") or next((a.partition("=")[2] for a in args if a.startswith("--ckpt_path=")), None)
    if given in (None, "last") or packaged.configs_in(args):
        return args
    checkpoint = last_checkpoint(Path(str(given)))
    if not checkpoint.is_file():
        raise UserError(f"--ckpt_path {given}: there is no {checkpoint}; give last, a checkpoint, or a run folder.")
    if run := run_folder_of(checkpoint):
        config: dict[str, Any] = yaml.safe_load((run / CONFIG).read_text())
        shared = {key: config[key] for key in ("seed_everything", "trainer", "model", "data")}
        return ["--config", yaml.safe_dump(shared), *args]
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    network = stored["hyper_parameters"].get("model")
    if not network:
        return args
    module = {"class_path": _MODULES[stored.get("slm_task", "causal")], "init_args": {"model": network}}
    return ["--config", yaml.safe_dump({"model": module}), *args]
