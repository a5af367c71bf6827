"""Numerical parts that several methods share: optimal brain surgeon, range calibration, structured selection."""
