"""How a batch is split over ranks and micro batches: what every configuration that trains refuses in the same words.

`PretrainConfig` and the methods of kind "training" both call this. It lies under both: training knows no compression,
and models import nothing of pipelines.
"""

from __future__ import annotations


def refuse_uneven(name: str, batch: int, world: int, micro: int) -> None:
    """Refuse a batch that ranks and their forward passes do not share evenly.

    Args:
        name: setting that holds the batch, as the error calls it.
        batch: sequences of one optimizer step.
        world: ranks.
        micro: sequences of one forward pass on one rank.

    Raises:
        ValueError: with the batches that are possible.
    """
    if batch % (unit := world * micro):
        raise ValueError(
            f"{name} = {batch} is not a multiple of world_size x micro_batch_size = {world} x {micro} = {unit}; "
            f"valid: {unit}, {2 * unit}, {3 * unit}, ..."
        )


def refuse_spread_plain(engine: str, world: int, zero_stage: int) -> None:
    """Refuse the plain engine on several ranks or with shards.

    Raises:
        ValueError: with the only values that it runs under.
    """
    if engine == "plain" and (world, zero_stage) != (1, 0):
        raise ValueError(
            f"engine = plain runs in one process without sharding: world_size = {world} must be 1 and "
            f"zero_stage = {zero_stage} must be 0"
        )
