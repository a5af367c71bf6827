"""The pretrain stage: engine, loop, checkpoints and data order."""
