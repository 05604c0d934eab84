"""FSDP2 for any LightningModule: one word in the Trainer (Zhao et al. 2023, https://arxiv.org/abs/2304.11277)."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy

from lightning_slm.nn.blocks import repeated_blocks
from lightning_slm.nn.sharded import gathered, is_sharded, sharded_like
from lightning_slm.nn.sharding import checkpoint_activations_, shard_, shard_blocks_
from lightning_slm.nn.targets import Patterns

DType = Literal["float32", "bfloat16", "float16"]


class FSDP2Strategy(ModelParallelStrategy):
    """Shard parameters, gradients and optimizer states over all processes; the LightningModule stays as it is.

    Precision plugins convert, then the repeated blocks are sharded, then the rest; no ``configure_model`` is needed.
    ``Trainer(strategy="slm_fsdp2")``, or with options ``Trainer(strategy=FSDP2Strategy(zero_stage=2))``.

    Args:
        zero_stage: 3: a block's weights are gathered for its forward and again for its backward pass; 2: once, and
            kept in between: faster, and one copy of the weights more. (1, the optimizer's states only:
            ``strategy="slm_zero1"``.)
        blocks: what is gathered together: "auto" finds the repeated blocks, or name patterns.
        replicas: hybrid sharding: so many copies of the model, each sharded over its share of the processes; the
            number of nodes is usual. Must divide the number of processes.
        activation_checkpointing: keep only the inputs of each block, and compute the rest again.
        compile: compile each block as a whole.
        param_dtype: what weights are gathered and computed in; None: as they are stored.
        reduce_dtype: what gradients are summed over processes in; None: as they come.
        cpu_offload: keep shards, gradients and optimizer states in CPU memory.
        meta_init: build what ``configure_model`` builds without memory, and give it its first weights block by block:
            for models that are larger than one process's memory.
        sync_micro_batches: sum the gradients of each micro-batch over processes at once, which keeps them sharded;
            otherwise only those of the last one, which keeps whole gradients in between.
        save_distributed_checkpoint: each process writes its shards into a folder; otherwise one file that loads
            anywhere.
        process_group_backend: of ``torch.distributed``; None: by device.

    Raises:
        ValueError: another zero_stage, or sizes that do not fit; when a run begins, a module that optimises manually or
            shards itself.
    """

    strategy_name = "slm_fsdp2"

    def __init__(
        self,
        zero_stage: Literal[2, 3] = 3,
        blocks: Patterns = "auto",
        replicas: int = 1,
        activation_checkpointing: bool = False,
        compile: bool = False,
        param_dtype: DType | None = None,
        reduce_dtype: DType | None = None,
        cpu_offload: bool = False,
        meta_init: bool = False,
        sync_micro_batches: bool = False,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint, process_group_backend=process_group_backend
        )
        if zero_stage == 1:
            raise ValueError('zero_stage=1 shards only the optimizer\'s states, not the model: strategy="slm_zero1".')
        if zero_stage not in (2, 3):
            raise ValueError(f"zero_stage={zero_stage!r} must be 2 or 3.")
        for name, dtype in {"param_dtype": param_dtype, "reduce_dtype": reduce_dtype}.items():
            if dtype not in (None, *get_args(DType)):
                raise ValueError(f"{name}={dtype!r} must be None or one of {', '.join(get_args(DType))}.")
        if replicas < 1:
            raise ValueError(f"replicas={replicas} must be at least 1.")
        self.zero_stage, self.blocks, self.replicas = zero_stage, blocks, replicas
        self.activation_checkpointing, self.compile_blocks = activation_checkpointing, compile
        self.param_dtype, self.reduce_dtype, self.cpu_offload = param_dtype, reduce_dtype, cpu_offload
        self.meta_init, self.sync_micro_batches = meta_init, sync_micro_batches
        self._micro_batches_to_sum = False

    # Where.

    def setup_environment(self) -> None:
        """All processes, as one dimension of shards or as replicas of shards."""
        world = self.num_nodes * self.num_processes
        if world % self.replicas:
            raise ValueError(f"replicas={self.replicas} must divide the {world} processes of this run.")
        self._data_parallel_size, self._tensor_parallel_size = world, 1
        super().setup_environment()
        self.shard_mesh = self.device_mesh["data_parallel"]
        if self.replicas > 1:
            sizes = (self.replicas, world // self.replicas)
            self.shard_mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=("replicas", "shards"))

    def tensor_init_context(self, empty_init: bool | None = None) -> Any:
        """Around ``configure_model``."""
        return super().tensor_init_context(self.meta_init if empty_init is None else empty_init)

    def setup(self, trainer: Any) -> None:
        """Convert, shard, then make the optimizers: they hold shards."""
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self._check(self.model)
        self.model = self.precision_plugin.convert_module(self.model)
        if not isinstance(self.model, FSDPModule):
            self._shard(self.model)
        self.model_to_device()
        self.barrier()
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting:
            _optimizers_to_device(self.optimizers, self.root_device)

    def model_to_device(self) -> None:
        """All of it; of an offloaded model only the buffers, which are not sharded."""
        if not self._offloads():
            return super().model_to_device()
        assert self.model is not None
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.root_device)

    def shard_frozen_(self, model: nn.Module) -> None:
        """Shard the repeated blocks of a model beside the one that trains, a teacher; calling them gathers them."""
        if not is_sharded(model):
            shard_blocks_([block for _, block in repeated_blocks(model)], self.shard_mesh)

    def _shard(self, model: nn.Module) -> None:
        blocks = [block for _, block in repeated_blocks(model, self.blocks)]
        if self.activation_checkpointing:
            checkpoint_activations_(model, blocks)
        if self.compile_blocks:
            for block in blocks:
                block.compile()
        dtypes = {"param_dtype": self.param_dtype, "reduce_dtype": self.reduce_dtype}
        policy = MixedPrecisionPolicy(**{k: getattr(torch, d) for k, d in dtypes.items() if d})  # type: ignore[arg-type]
        options: dict[str, Any] = {"mp_policy": policy}
        if hasattr(self.precision_plugin, "before_sharding_"):
            options["prepare"] = self.precision_plugin.before_sharding_
        if self._offloads():
            options["offload_policy"] = CPUOffloadPolicy()
        shard_(model, blocks, self.shard_mesh, self.zero_stage, **options)

    def _offloads(self) -> bool:
        return self.cpu_offload and self.root_device.type != "cpu"  # where it lies already

    def _check(self, model: Any) -> None:
        if is_sharded(model) and not isinstance(model, FSDPModule):
            raise ValueError(
                f"{type(model).__name__} shards itself in configure_model, and slm_fsdp2 would shard it again: take "
                "fully_shard out there, or use Lightning's ModelParallelStrategy."
            )
        if not model.automatic_optimization:
            raise ValueError(
                f"{type(model).__name__} optimises manually: its backward pass would run inside of the training step, "
                "and slm_fsdp2 gathers what belongs to no block around all of that. Use automatic optimization, or "
                'strategy="slm_zero1" or "ddp".'
            )

    # Steps: through the module's own call, which gathers what belongs to no block.

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As Lightning's."""
        with self.precision_plugin.train_step_context():
            self.model.set_requires_gradient_sync(not self._micro_batches_to_sum)  # type: ignore[union-attr, operator]
            return self._call("training_step", *args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """As Lightning's."""
        with self.precision_plugin.val_step_context(), _no_grad():
            return self._call("validation_step", *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """As Lightning's."""
        with self.precision_plugin.test_step_context(), _no_grad():
            return self._call("test_step", *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """As Lightning's."""
        with self.precision_plugin.predict_step_context(), _no_grad():
            return self._call("predict_step", *args, **kwargs)

    def _call(self, step: str, *args: Any, **kwargs: Any) -> Any:
        assert self.model is not None
        assert self.lightning_module is not None
        return self._forward_redirection(self.model, self.lightning_module, step, *args, **kwargs)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around all micro-batches of a step but the last."""
        self._micro_batches_to_sum = not self.sync_micro_batches
        try:
            yield
        finally:
            self._micro_batches_to_sum = False

    # Checkpoints: a file like anyone's, or a folder of shards.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights on the first rank, or each rank's shards."""
        if self._save_distributed_checkpoint:
            return super().lightning_module_state_dict()
        assert self.lightning_module is not None
        return gathered(self.lightning_module.state_dict(), keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """As `lightning_module_state_dict`."""
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        return gathered(getattr(optimizer, "_optimizer", optimizer).state_dict(), keep=self.is_global_zero)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """A folder of shards is written under another name and renamed when all are there."""
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            return super().save_checkpoint(checkpoint, path, storage_options)
        new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
        if self.is_global_zero:
            shutil.rmtree(new, ignore_errors=True)
        self.barrier()
        super().save_checkpoint(checkpoint, new, storage_options)
        self.barrier()
        if self.is_global_zero:
            if path.exists():
                path.rename(old)
            new.rename(path)
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """A folder of shards, or a file of any strategy, cut for this many processes.

        Raises:
            ValueError: weights or optimizer states of another model.
        """
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            return super().load_checkpoint(path, weights_only)
        assert self.lightning_module is not None
        checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        self._load_weights(checkpoint.pop("state_dict"), path)
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", [])):
            optimizer.load_state_dict(_cut_for(optimizer, state, path))
        return checkpoint

    def _load_weights(self, weights: dict[str, Any], path: Path) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        if wrong := [k for k, v in weights.items() if k in own and getattr(v, "shape", None) != own[k].shape]:
            shapes = f"{tuple(weights[wrong[0]].shape)}, in the model {tuple(own[wrong[0]].shape)}"
            raise ValueError(f"{str(path)!r} is of another model: {wrong[0]!r} is {shapes}; build it with those sizes.")
        cut = {key: sharded_like(value, own[key]) if key in own else value for key, value in weights.items()}
        self.lightning_module.load_state_dict(cut, strict=self.lightning_module.strict_loading)

    # The end.

    def on_exception(self, exception: BaseException) -> None:
        """Say what a broken connection means."""
        text = str(exception)
        lost = ("Connection closed", "Connection reset", "Broken pipe", "Timed out waiting", "NCCL", "gloo")
        if isinstance(exception, dist.DistError | RuntimeError) and any(sign in text for sign in lost):
            exception.add_note(
                f"Rank {self.global_rank} of {self.world_size} lost another process, which has ended or hangs: its own "
                "output says why. Start the run again with ckpt_path= the last checkpoint; the number of processes may "
                "be another."
            )
        super().on_exception(exception)


def _cut_for(optimizer: Any, state: dict[str, Any], path: Path) -> dict[str, Any]:
    """The states of an optimizer cut as its parameters are; both list them in the order of its groups."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    ids = [i for group in state["param_groups"] for i in group["params"]]
    if len(params) != len(ids):
        raise ValueError(f"{str(path)!r}: its optimizer has {len(ids)} parameters, this run's {len(params)}.")
    cut = {i: {k: _like(v, p) for k, v in state["state"].get(i, {}).items()} for i, p in zip(ids, params)}
    return {**state, "state": {i: values for i, values in cut.items() if values}}


def _like(value: Any, param: torch.Tensor) -> Any:
    return sharded_like(value, param) if isinstance(value, torch.Tensor) else value


@contextmanager
def _no_grad() -> Iterator[None]:
    """Not inference mode: what FSDP2 keeps from one call to the next must be fit for training."""
    with torch.inference_mode(False), torch.no_grad():
        yield
