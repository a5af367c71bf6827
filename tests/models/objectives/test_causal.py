"""The next token, against a plain statement of what it is."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from models.objectives.base import IGNORED
from models.objectives.causal import next_tokens


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_a_causal_target_is_the_next_token_unless_that_is_padding_or_of_another_document(tokens: list[int]) -> None:
    targets = next_tokens(np.array([tokens]), bos_id=0, pad_id=2)[0].tolist()
    for position, target in enumerate(targets):
        following = tokens[position + 1] if position + 1 < len(tokens) else 2
        asked = following not in (0, 2) and tokens[position] != 2
        assert target == (following if asked else IGNORED)
