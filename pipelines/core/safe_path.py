"""The one way to put a name that came from elsewhere below a folder: it never leads out of it.

Such names stand in manifests, in lists of checkpoints on S3, in listings of servers. What people type, and the names
that this program makes, need no such care. Archives are never unpacked: no format that is read is one.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from pipelines.core.errors import IntegrityError


def safe_join(folder: Path, name: str, *, said_by: str) -> Path:
    """Return the path of a file below a folder.

    Args:
        folder: where it must stay.
        name: relative, with `/` between its parts.
        said_by: where the name stands, for the message.

    Raises:
        IntegrityError: the name is empty, absolute, has a part `..` or a byte that no file name can have.
    """
    parts = PurePosixPath(name).parts
    if not parts or parts[0].startswith("/") or ".." in parts or "\0" in name:
        raise IntegrityError(
            f"{said_by} names the file {name!r}, which lies outside of {folder}",
            hint="it was not made by Ingot, or not for this use: take nothing from there",
        )
    return folder.joinpath(*parts)
