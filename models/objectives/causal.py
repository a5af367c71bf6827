"""Predict the next token."""

from __future__ import annotations

import numpy as np

from models.objectives import base
from models.objectives.base import IGNORED, Ids


def next_tokens(tokens_BT: Ids, pad_id: int) -> Ids:
    """Return the next token of every position; the last position and padding ask for nothing."""
    targets_BT = np.full_like(tokens_BT, IGNORED)
    targets_BT[:, :-1] = tokens_BT[:, 1:]
    targets_BT[targets_BT == pad_id] = IGNORED
    return targets_BT


class Objective(base.Objective):
    """Causal language modelling."""

    families = frozenset({"decoder"})

    def targets(self, tokens_BT: Ids, samples_B: Ids, epochs_B: Ids) -> tuple[Ids, Ids]:
        """Return the tokens and the next ones; samples and epochs have no part in it."""
        del samples_B, epochs_B
        return tokens_BT, next_tokens(tokens_BT, self.context.pad_id)
