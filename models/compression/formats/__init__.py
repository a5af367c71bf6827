"""How a compressed tensor is stored: integer grids, sparse, binary, NF, and rounded inputs."""
