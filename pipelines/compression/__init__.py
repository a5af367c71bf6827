"""The compress stage: calibration, a driver for each kind of method, and the packed variant."""
