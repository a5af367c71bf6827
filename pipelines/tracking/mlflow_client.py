"""MLflow's client without a look-up before every change. Importing this imports MLflow, which takes seconds.

This is the one place that reaches into MLflow's client for a private method; `flows/constraints.txt` pins the version.
"""

from __future__ import annotations

from mlflow import MlflowClient


class Client(MlflowClient):
    """`MlflowClient` for registered models alone.

    MLflow keeps prompts among the registered models, and its client asks before each change of a model whether it is
    one: a second request for each, which a distant server answers in seconds. The names that Ingot changes are models.
    """

    def _raise_if_prompt(self, name: str) -> None:
        """Ask nothing."""
