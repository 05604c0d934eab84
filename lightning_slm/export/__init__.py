"""Trained models as files that others can load."""

from lightning_slm.export.huggingface import Exported, folder_bytes, save_hf_folder

__all__ = ["Exported", "folder_bytes", "save_hf_folder"]
