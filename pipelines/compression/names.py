"""Names of the files that a compressed child has and a plain model folder has not."""

PRIVATE_STEM = "packed"
"""File stem of weights that need `pipelines.modelio.load`; plain transformers finds no weights and says so."""
CACHE_TABLES = "kv_cache.safetensors"
"""File of how attention caches are coded, in a child of a `kv_cache` method; it holds no weights."""
