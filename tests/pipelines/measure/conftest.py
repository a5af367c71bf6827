"""The fixtures of the evaluation tests, which this package was grown in."""

from tests.pipelines.evaluation.conftest import (  # noqa: F401 - fixtures
    context,
    decoder,
    decoder_artifact,
    encoder,
    encoder_artifact,
    one_thread,
    prepared,
    save_model,
    small,
)
