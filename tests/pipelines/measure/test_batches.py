"""Which tokens are scored: every one of a decoder once, the masked ones of an encoder, or a clear refusal."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.measure import heldout
from pipelines.measure.batches import plan_batches, window_tokens
from pipelines.measure.config import BatchSettings


def test_a_decoder_is_scored_on_every_token_once(prepared: Artifact) -> None:
    documents = heldout.load(prepared.path)
    planned = plan_batches(BatchSettings(), documents, "decoder", prepared.path)
    assert planned.scored == sum(len(ids) - 1 for ids in documents.tokens)
    counted = np.bincount(np.concatenate([batch.documents for batch in planned.batches]))
    assert counted.tolist() == [len(ids) - 1 for ids in documents.tokens]
    np.testing.assert_array_equal(planned.sizes, documents.sizes)
    assert planned.masked == ()


def test_an_encoder_is_scored_where_its_mask_hides(prepared: Artifact) -> None:
    documents = heldout.load(prepared.path)
    planned = plan_batches(BatchSettings(mask_rate=0.3, mask_seed=4), documents, "encoder", prepared.path)
    assert planned.scored == sum(int(hidden.sum()) for hidden in planned.masked)
    other = plan_batches(BatchSettings(mask_rate=0.3, mask_seed=5), documents, "encoder", prepared.path)
    assert any((a != b).any() for a, b in zip(planned.masked, other.masked, strict=True))
    # A masked token's bytes are a part of the document's.
    assert (planned.sizes < documents.sizes).all()


def test_windows_are_as_long_as_the_prepared_sequences_unless_told(prepared: Artifact) -> None:
    documents = heldout.load(prepared.path, 2)
    assert window_tokens(BatchSettings(), documents) == documents.index["sequence_length"]
    assert window_tokens(BatchSettings(context=16), documents) == 16


def test_a_stride_that_the_prepared_length_does_not_allow_is_refused_with_the_range(prepared: Artifact) -> None:
    documents = heldout.load(prepared.path)
    for settings in (BatchSettings(stride=65), BatchSettings(batch_tokens=63)):
        with pytest.raises(ConfigError, match="do not fit a context of 64 tokens; valid: a stride of 1 to 64"):
            plan_batches(settings, documents, "decoder", prepared.path)
