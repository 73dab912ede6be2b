"""What is set from data without training."""

from qat.calibration.ladder import set_rung
from qat.calibration.ranges import calibrate, freeze_batch_norm, freeze_ranges, reestimate_batch_norm, set_observing

__all__ = ["calibrate", "freeze_batch_norm", "freeze_ranges", "reestimate_batch_norm", "set_observing", "set_rung"]
