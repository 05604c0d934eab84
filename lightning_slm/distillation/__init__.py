"""Learning from a teacher: losses on tensors, frozen teachers, and the student's logits wherever they are made."""

from lightning_slm.distillation.losses import distillation_loss, forward_kl, forward_kl_rows
from lightning_slm.distillation.student import StudentWatch
from lightning_slm.distillation.teacher import Answer, Teacher, fingerprint, freeze_, vocabulary
from lightning_slm.distillation.terms import ChunkedTerm, whole_term

__all__ = [
    "Answer",
    "ChunkedTerm",
    "StudentWatch",
    "Teacher",
    "distillation_loss",
    "fingerprint",
    "forward_kl",
    "forward_kl_rows",
    "freeze_",
    "vocabulary",
    "whole_term",
]
