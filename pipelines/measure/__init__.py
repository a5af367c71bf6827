"""Scoring a model on held-out text: windows, losses, bits per byte, paired intervals."""
