"""How a compressed tensor is stored: integer grids, sparse, binary, NF, FP8, and rounded inputs."""
