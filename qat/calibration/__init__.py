"""What is set from data without training."""

from qat.calibration.ranges import calibrate, freeze_batch_norm, freeze_ranges, reestimate_batch_norm, set_observing
from qat.calibration.rungs import set_rung

__all__ = ["calibrate", "freeze_batch_norm", "freeze_ranges", "reestimate_batch_norm", "set_observing", "set_rung"]
