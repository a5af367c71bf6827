"""Predict the next token."""

from __future__ import annotations

import numpy as np

from models.architectures import documents
from models.objectives import base
from models.objectives.base import IGNORED, Ids


def next_tokens(tokens_BT: Ids, *, bos_id: int, pad_id: int) -> Ids:
    """Return the next token of every position, `IGNORED` where it is of another document, and before padding."""
    targets_BT = np.full_like(tokens_BT, IGNORED)
    starts_BT = documents.starts(tokens_BT, bos_id=bos_id, pad_id=pad_id)
    asked_BT = ~starts_BT[:, 1:] & (tokens_BT[:, 1:] != pad_id)
    targets_BT[:, :-1] = np.where(asked_BT, tokens_BT[:, 1:], IGNORED)
    return targets_BT


class Objective(base.Objective):
    """Causal language modelling."""

    families = frozenset({"decoder"})

    def targets(self, tokens_BT: Ids, samples_B: Ids, epochs_B: Ids) -> tuple[Ids, Ids]:
        """Return the tokens and the next ones; samples and epochs have no part in it."""
        del samples_B, epochs_B
        return tokens_BT, next_tokens(tokens_BT, bos_id=self.context.bos_id, pad_id=self.context.pad_id)
