"""Tensors only: architectures, optimizers and compression maths."""
