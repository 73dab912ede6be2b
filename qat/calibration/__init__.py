"""What is set from data without training."""

from qat.calibration.algorithms import calibrate
from qat.calibration.ranges import (
    freeze_batch_norm,
    freeze_ranges,
    merge_batch_norm,
    merge_ranges,
    reestimate_batch_norm,
    set_observing,
    start_merging,
)
from qat.calibration.rungs import set_rung

__all__ = ["calibrate", "freeze_batch_norm", "freeze_ranges", "merge_batch_norm", "merge_ranges",
           "reestimate_batch_norm", "set_observing", "set_rung", "start_merging"]
