"""Optimizers over fragments of sharded tensors, and LISA's layer draw."""
