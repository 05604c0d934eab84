"""Train more on the domains that lag behind (Xia et al. 2024, https://arxiv.org/abs/2310.06694, algorithm 1)."""

# Shape letters: B = windows in a batch, T = tokens in a window, N = B * (T - 1) predicted positions, V = vocabulary.

from itertools import islice
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_slm.callbacks._calibration import forward
from lightning_slm.callbacks._find import network_of
from lightning_slm.measure.quality import evaluating
from lightning_slm.nn.language_model import logits_of


class DynamicBatchLoading(Callback):
    """Every so often measure the validation loss of each domain of a `DomainData`, and give those a larger share of the
    training batches that are still far above their reference.

    The shares are the data module's, which keeps them in checkpoints.

    Args:
        reference: name -> the loss that the domain is to come to, in nats per token: that of a model of the target's
            size, measured or foretold by a scaling law. One number for each domain.
        every: optimizer steps between two measurements.
        batches: at most so many validation batches of each domain, and rank.
    """

    def __init__(self, reference: dict[str, float], every: int = 50, batches: int = 8) -> None:
        if every < 1 or batches < 1:
            raise ValueError(f"every={every} and batches={batches} must be at least 1.")
        self.reference, self.every, self.batches = reference, every, batches

    # What to override.

    def new_shares(self, shares: dict[str, float], losses: dict[str, float]) -> dict[str, float]:
        """The next shares of the domains."""
        from lightning_slm.data import exponential_ascent  # here, since transformers takes seconds to import

        return exponential_ascent(shares, losses, self.reference)

    # When.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse data without domains, or with others."""
        if stage != "fit":
            return
        domains = getattr(trainer.datamodule, "domains", None)
        if domains is None or not hasattr(trainer.datamodule, "update_shares"):
            raise ValueError(
                f"DynamicBatchLoading changes the shares of domains, and {type(trainer.datamodule).__name__} has none: "
                "give trainer.fit a DomainData(domains={name: path, ...})."
            )
        if self.reference.keys() != domains.keys():
            raise ValueError(f"reference has {', '.join(self.reference)}, but the domains are {', '.join(domains)}.")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Between two steps, once.

        Not at the end of a step, where a checkpoint may be written before us or after us.
        """
        data, step = trainer.datamodule, trainer.global_step
        done = data.updates[-1]["step"] if data.updates else 0
        if step == done or step % self.every:
            return
        losses = {name: self._loss(trainer, pl_module, data.domain_loader(name)) for name in data.domains}
        data.update_shares(self.new_shares(data.shares, losses), step)
        for name, share in data.shares.items():
            pl_module.log(f"slm/domain_share/{name}", share, on_step=True, on_epoch=False)
            pl_module.log(f"slm/domain_loss/{name}", losses[name], on_step=True, on_epoch=False)

    @property
    def state_key(self) -> str:
        """Tells two instances apart."""
        return self._generate_state_key(reference=self.reference, every=self.every, batches=self.batches)

    # How.

    def _loss(self, trainer: Any, pl_module: Any, loader: Any) -> float:
        """Nats per token, over the batches of all ranks."""
        network, sums = network_of(pl_module), torch.zeros(2, dtype=torch.float64, device=pl_module.device)
        with evaluating(network), torch.no_grad():
            for batch in islice(loader, self.batches):
                batch = trainer.strategy.batch_to_device(batch, pl_module.device)
                sums += _nats_and_tokens(forward(trainer, pl_module, batch), batch["labels"])
        nats, tokens = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        return nats / max(tokens, 1.0)


def _nats_and_tokens(output: Any, labels_BT: Tensor) -> Tensor:
    logits_BTV = logits_of(output)
    if logits_BTV is None:
        raise ValueError(f"The network gives {type(output).__name__}: the loss of a domain cannot be measured.")
    logits_NV, labels_N = logits_BTV[:, :-1].float().flatten(0, 1), labels_BT[:, 1:].flatten()
    nats = nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")
    return torch.stack([nats.double(), (labels_N != -100).sum().double()])
