"""The fixtures of the compression tests, which this package was grown in."""

from tests.pipelines.compression.conftest import compress, small  # noqa: F401 - fixtures
