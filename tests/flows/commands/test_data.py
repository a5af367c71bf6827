"""`ingot data VERB`: which corpus the verbs are about, and what they print."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from flows.commands import data
from pipelines.core.errors import ConfigError
from pipelines.core.program import ROOT as CHECKOUT


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGOT_PROJECT", str(CHECKOUT))


@pytest.mark.parametrize(
    "verb",
    [
        lambda settings: data.run("status", settings, None, as_json=True),
        lambda settings: data.run("pull", settings, None, as_json=True, force=True),
        lambda settings: data.run("push", settings, None, as_json=True, into_git=True),
        lambda settings: data.run("update", settings, None, as_json=True, force=False),
        lambda settings: data.diff("HEAD", "HEAD", settings, None, as_json=True),
        lambda settings: data.push_prepared(settings, None, into_git=True, as_json=True),
        lambda settings: data.pull_prepared(settings, None, as_json=True),
    ],
)
def test_every_verb_is_about_the_corpus_of_the_settings(verb: Callable[[list[str]], None]) -> None:
    with pytest.raises(ConfigError, match=r"corpora/en\.dvc"):
        verb(["data.path=corpora/en/"])
    with pytest.raises(ConfigError, match="is no setting"):
        data.run("status", ["corpora/en"], None, as_json=True)


def test_log_prints_rows_with_hash_and_revision(capsys: pytest.CaptureFixture[str]) -> None:
    data.log(["data.rev=HEAD"], "demo", 1, as_json=True)
    (row,) = json.loads(capsys.readouterr().out)
    assert row["hash"].endswith(".dir")
    assert len(row["revision"]) == 10
    data.log(["data.path=corpora/en"], "demo", 1, as_json=False)
    assert "git has no version of corpora/en.dvc yet" in capsys.readouterr().out


def test_a_prepared_corpus_on_s3_needs_no_push(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store itself is what machines share."""

    class Plan:
        class store:  # noqa: N801
            address = "s3://bucket/store"

    monkeypatch.setattr("flows.run_plan.make", lambda *_: Plan)
    with pytest.raises(ConfigError, match="has every prepared corpus in it already"):
        data.push_prepared([], None, into_git=False, as_json=True)
