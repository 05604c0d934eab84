"""Layers and token mixers, each fast one beside its naive twin; and how layers are chosen by name."""
