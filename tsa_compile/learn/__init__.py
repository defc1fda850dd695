"""Calibration: a per-layer plan, chosen on the user's own prompts by what the loss says."""

from tsa_compile.learn.calibrate import calibrate

__all__ = ["calibrate"]
