"""Probes: what is measured of a model besides its likelihoods and tasks, one file each; see `evaluation/probe.py`."""
