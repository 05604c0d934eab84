"""One calibration engine: any model, block after block, and statistics of what its layers are given."""

from lightning_slm.calibration.blockwise import Layer, calibrate_
from lightning_slm.calibration.run import run_model
from lightning_slm.calibration.statistics import InputGram, InputNorms, Statistic
from lightning_slm.calibration.watch import Watch

__all__ = ["InputGram", "InputNorms", "Layer", "Statistic", "Watch", "calibrate_", "run_model"]
