"""Every way a command can end, as one tree of errors; each class carries its exit code.

A message says what was wrong and where; `hint` says what to do about it.
"""

from __future__ import annotations


class IngotError(Exception):
    """Base of all errors that a user is meant to read.

    Args:
        message: what was wrong, and where.
        hint: what to do; printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  -> {self.hint}"


class ConfigError(IngotError):
    """The configuration cannot be run: unknown key, wrong type, impossible size."""

    exit_code = 2


class IntegrityError(IngotError):
    """Bytes are not what their hash says, or the data is not fit for use."""

    exit_code = 3


class TransientError(IngotError):
    """A fault that may pass (network, port, memory) outlasted its retries."""

    exit_code = 4


class DiskFullError(TransientError):
    """There is no space left to write to; trying again at once would only repeat the work."""


class NumericError(IngotError):
    """Weights that are not finite, or training that made such numbers for longer than the configuration allows."""

    exit_code = 5


class LockedError(IngotError):
    """Another run holds the lease on what this run needs."""

    exit_code = 6


class LockLost(LockedError):
    """Another machine has taken over what this process worked on, because it showed no sign of life for too long."""


class GateRefused(IngotError):
    """The candidate did not pass the promotion gate."""

    exit_code = 7


class DataRefused(IngotError):
    """The corpus breaks a rule that the recipe sets: a decision about data, not damage."""

    exit_code = 8


class Preempted(IngotError):
    """A signal asked the run to stop; its state is saved and the same command goes on."""

    exit_code = 75


BY_EXIT_CODE: dict[int, type[IngotError]] = {
    error.exit_code: error
    for error in (
        ConfigError,
        IntegrityError,
        TransientError,
        NumericError,
        LockedError,
        GateRefused,
        DataRefused,
        Preempted,
    )
}
"""Maps the exit code of a worker process back to the error it stands for."""
