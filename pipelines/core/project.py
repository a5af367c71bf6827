"""The project: the folder with a user's corpus (`data.dvc`, `data/`), recipes and store, found as git finds its own.

`ingot.toml` marks it. The checkout is a project too, that of the demo; `ingot new` makes others. Where the program lies
is another matter: see `pipelines.core.program`.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from pipelines.core.errors import ConfigError
from pipelines.core.settings import Settings

MARKER = "ingot.toml"
VARIABLE = "INGOT_PROJECT"
"""Names the project's folder where the working directory is another, as for a worker that serves several."""
RECIPES = "recipes"
"""Folder of a project's own recipes."""


class ProjectSettings(Settings):
    """What `ingot.toml` says."""

    recipe: str = Field(min_length=1, description="Recipe that commands take where none is named.")


def find(start: Path | None = None) -> Path:
    """Return the project: what $INGOT_PROJECT names, else the nearest folder above with an `ingot.toml`.

    Args:
        start: where to look first; the working directory if left out, and only then is the environment asked.

    Raises:
        ConfigError: there is none.
    """
    if (found := find_any(start)) is None:
        raise ConfigError(
            f"no project here: neither {start or Path.cwd()} nor a folder above it has an {MARKER}",
            hint=f"`ingot new NAME --data FOLDER` makes a project; or go into one, or let ${VARIABLE} name it",
        )
    return found


def find_any(start: Path | None = None) -> Path | None:
    """Return the project as `find` does, or None where there is none.

    Raises:
        ConfigError: $INGOT_PROJECT names a folder that is none.
    """
    if start is None and (named := os.environ.get(VARIABLE)):
        if not (Path(named) / MARKER).is_file():
            raise ConfigError(f"${VARIABLE} is {named}, where there is no {MARKER}", hint="`ingot new` makes a project")
        return Path(named).resolve()
    place = (start or Path.cwd()).resolve()
    return next((folder for folder in (place, *place.parents) if (folder / MARKER).is_file()), None)


def settings(root: Path) -> ProjectSettings:
    """Return what a project's `ingot.toml` says.

    Raises:
        ConfigError: it cannot be read, or says something unknown.
    """
    path = root / MARKER
    try:
        return ProjectSettings.model_validate(read_toml(path))
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError("\n".join(lines), hint='it has one key: recipe = "NAME"') from None


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table in a TOML file; a byte-order mark before it, as some editors write, counts nothing.

    Raises:
        ConfigError: it is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", hint="a recipe is a UTF-8 text file") from None
    except RecursionError:
        raise ConfigError(f"{path} is not valid TOML: its brackets are nested too deep") from None
