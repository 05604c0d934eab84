"""LightningModules, the optimizer and the schedules they train with."""

from lightning_slm.modules.causal_lm import CausalLM
from lightning_slm.modules.masked_lm import MaskedLM
from lightning_slm.modules.muon_adamw import MuonAdamW, orthogonalize
from lightning_slm.modules.parameter_groups import parameter_groups
from lightning_slm.modules.schedules import CosineSchedule, Schedule, WSDSchedule
from lightning_slm.modules.sequence_classifier import SequenceClassifier

__all__ = [
    "CausalLM",
    "CosineSchedule",
    "MaskedLM",
    "MuonAdamW",
    "Schedule",
    "SequenceClassifier",
    "WSDSchedule",
    "orthogonalize",
    "parameter_groups",
]
