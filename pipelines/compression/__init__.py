"""The compress stage: calibration, the layer walk and the packed export."""
