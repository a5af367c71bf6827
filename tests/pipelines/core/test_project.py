"""The project is found by walking up, by name of the environment, or not at all, with the way to make one."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.core import project
from pipelines.core.errors import ConfigError


@pytest.fixture(autouse=True)
def _nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(project.VARIABLE, raising=False)


@pytest.fixture(params=["plain", "with spaces", "100% mine"])
def root(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    folder: Path = tmp_path / request.param
    (folder / "deep" / "below").mkdir(parents=True)
    (folder / project.MARKER).write_text('recipe = "mine"')
    return folder


def test_it_is_found_from_any_folder_below(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (root, root / "deep", root / "deep" / "below"):
        monkeypatch.chdir(folder)
        assert project.find() == root
    assert project.settings(root).recipe == "mine"


def test_the_nearest_one_counts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "deep" / project.MARKER).write_text('recipe = "inner"')
    monkeypatch.chdir(root / "deep" / "below")
    assert project.find() == root / "deep"


def test_the_environment_comes_first(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(project.VARIABLE, str(root))
    assert project.find() == root
    monkeypatch.setenv(project.VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError, match=r"there is no ingot\.toml"):
        project.find()


def test_outside_of_any_the_error_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert project.find_any() is None
    with pytest.raises(ConfigError, match="no project here") as caught:
        project.find()
    assert "ingot new" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"), [("recipe =", "not valid TOML"), ("", "recipe: Field required"), ('recipe = "x"\nn = 1', "n: ")]
)
def test_a_marker_that_cannot_be_read_is_refused(root: Path, text: str, said: str) -> None:
    (root / project.MARKER).write_text(text)
    with pytest.raises(ConfigError, match=said):
        project.settings(root)
