"""Names: every form finds the same model, an exact one before a beginning, and a dead end says where to go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.commands import lookup
from flows.run_record import NodeRecord, RunRecord, Runs
from pipelines.core import artifact, fingerprint
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.core.store import LocalStore
from pipelines.registry import history
from pipelines.tracking.client import connect
from pipelines.tracking.config import TrackingConfig

Made = Callable[..., Artifact]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    """The store that the commands use; its MLflow does not exist."""
    monkeypatch.setenv("INGOT_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return LocalStore(tmp_path / "store")


@pytest.fixture
def made(store: LocalStore) -> Made:
    """Publish an artifact with a model folder."""

    def publish(node: str, content: str = "x") -> Artifact:
        stage = node.partition(".")[0]
        build = store.build_folder(stage, node)
        (build / "model").mkdir()
        (build / "model" / "config.json").write_text(content + node)
        identity: dict[str, Any] = {"node": node, "content": content, "inputs": {}}
        final = store.path(stage, fingerprint.digest(identity))
        return artifact.publish(build, final, stage=stage, node=node, identity=identity, parents={}, summary={})

    return publish


def remember(store: LocalStore, *made: Artifact, promoted: str | None = None, candidate: str = "smallest") -> RunRecord:
    """Record a run that made these artifacts."""
    nodes = {a.manifest.node: NodeRecord(stage=a.manifest.stage, fingerprint=a.manifest.fingerprint) for a in made}
    summary = {} if promoted is None else {"candidate": promoted}
    nodes["promote"] = NodeRecord(stage="promote", fingerprint="f" * 64, summary=summary)
    config = {"promote": {"candidate": candidate}}
    runs = Runs(store.root)
    record = runs.start(recipe="smoke", overrides=[], config=config, data_hash="d", nodes=nodes)
    runs.finish(record, "done", 0)
    return record


def crown(store: LocalStore, model: str, version: str, champion: Artifact, action: str = history.PROMOTE) -> None:
    facts = {"fingerprint": champion.manifest.fingerprint, "digest": champion.digest}
    history.append(store.root, model, action, version=version, why="a test", **facts)


def test_every_form_of_a_name_finds_the_model(store: LocalStore, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    base, variant = made("pretrain"), made("compress.gptq-int4-g64")
    run = remember(store, base, variant, promoted="gptq-int4-g64")
    crown(store, "m", "2", base)
    crown(store, "m", "3", variant)
    monkeypatch.chdir(variant.path.parent)
    names = ["champion", "m", "m@champion", "m/3", "models:/m/3", "models:/m@champion", "compress.gptq-int4-g64"]
    names += ["gptq-int4-g64", run.id, run.id[:15], f"{run.id}/compress.gptq-int4-g64", f"{run.id[:15]}/gptq-int4-g64"]
    names += [variant.manifest.fingerprint, variant.manifest.fingerprint[:9], variant.digest, str(variant.path)]
    names += [variant.path.name, str(variant.path / "model")]
    assert {name: lookup.find_model(name).path.resolve() for name in names} == dict.fromkeys(names, variant.path)
    for name in ("m/2", "pretrain", f"{run.id}/pretrain"):
        assert lookup.find_model(name).path == base.path
    assert lookup.find(run.id) == run


def test_with_two_registered_models_champion_is_no_dead_end(store: LocalStore, made: Made) -> None:
    one, other = made("pretrain"), made("pretrain", "other")
    crown(store, "one", "1", one)
    crown(store, "other", "1", other)
    with pytest.raises(ConfigError, match="there are 2 registered models") as caught:
        lookup.find_model("champion")
    assert caught.value.hint == "say which: one@champion, other@champion"
    assert lookup.find_model("other@champion").path == other.path


def test_a_node_is_that_of_the_newest_run_whose_artifact_is_there(store: LocalStore, made: Made) -> None:
    older, newer = made("pretrain"), made("pretrain", "newer")
    remember(store, older)
    remember(store, newer)
    assert lookup.find_model("pretrain").path == newer.path
    newer.path.rename(store.root / "gone")
    assert lookup.find_model("pretrain").path == older.path


def test_an_ambiguous_beginning_lists_what_it_may_mean_and_an_exact_name_is_preferred(
    store: LocalStore, made: Made
) -> None:
    base = made("pretrain")
    first, second = remember(store, base), remember(store, base)
    with pytest.raises(ConfigError, match="is the beginning of 2 names") as caught:
        lookup.find(first.id[:4])  # the year
    assert first.id in str(caught.value)
    assert second.id in str(caught.value)
    assert lookup.find(first.id) == first  # though the id of the second may begin so


def test_the_beginning_of_two_fingerprints_is_refused(
    store: LocalStore, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "_MIN_DIGITS", 1)  # seventeen artifacts share a first digit; six digits take thousands
    found: dict[str, Artifact] = {}
    for number in range(17):
        one = made("pretrain", str(number))
        digit = one.manifest.fingerprint[0]
        if digit in found:
            break
        found[digit] = one
    with pytest.raises(ConfigError, match=f"'{digit}' is the beginning of .* names") as caught:
        lookup.find(digit)
    assert f"pretrain {one.manifest.fingerprint[:5]}" in str(caught.value)
    assert lookup.find(one.manifest.fingerprint) == one


def test_what_is_not_there_is_said_with_the_nearest_name(store: LocalStore, made: Made) -> None:
    run = remember(store, made("compress.rtn-int8"))
    crown(store, "ingot-demo", "1", made("compress.rtn-int8"))
    for wrong, near in (
        ("compress.rtn-int9", "did you mean 'compress.rtn-int8'?"),
        ("champiom", "did you mean 'champion'?"),
        (f"{run.id}/compress.rtn-int9", f"did you mean {run.id}/compress.rtn-int8?"),
        ("ingot-dem@champion", "did you mean ingot-demo@champion?"),
        ("ingot-demo/7", "ingot-demo has no version 7"),
        ("ingot-demo@best", "ingot-demo has no alias 'best'"),
    ):
        with pytest.raises(ConfigError) as caught:
            lookup.find(wrong)
        assert near in str(caught.value)


def test_a_node_without_an_artifact_and_a_folder_without_a_manifest_are_called_that(
    store: LocalStore, made: Made, tmp_path: Path
) -> None:
    base = made("pretrain")
    run = remember(store, base)
    base.path.rename(store.root / "gone")
    with pytest.raises(ConfigError, match=f"the artifact of {run.id}/pretrain is not in") as caught:
        lookup.find("pretrain")
    assert caught.value.hint == f"`ingot run --recipe {run.id}` makes it"
    with pytest.raises(ConfigError, match="holds no artifact"):
        lookup.find(str(tmp_path))


def test_a_registered_model_whose_artifact_is_gone_or_was_made_again_is_never_passed_off_as_it(
    store: LocalStore, made: Made
) -> None:
    base = made("pretrain")
    crown(store, "m", "1", base)
    history.append(
        store.root, "m", history.PROMOTE, version="2", why="", fingerprint=base.manifest.fingerprint, digest="0"
    )
    with pytest.raises(ConfigError, match="m/2 is registered, but the artifact"):
        lookup.find("m@champion")
    base.path.rename(store.root / "gone")
    with pytest.raises(ConfigError, match="m/1 is registered, but the artifact"):
        lookup.find("m/1")


def test_a_run_is_the_model_that_it_promoted_or_was_to_promote(store: LocalStore, made: Made) -> None:
    base, variant = made("pretrain"), made("compress.v")
    assert lookup.find_model(remember(store, base, variant, promoted="v").id) == variant
    assert lookup.find_model(remember(store, base, variant, candidate="pretrain").id) == base
    undecided = remember(store, base, variant)
    with pytest.raises(ConfigError, match="has promoted no model") as caught:
        lookup.find_model(undecided.id)
    assert f"{undecided.id}/pretrain, {undecided.id}/v" in str(caught.value)


def test_a_candidate_leads_to_the_run_that_made_it(store: LocalStore, made: Made) -> None:
    old, new = made("compress.v", "old"), made("compress.v")
    first, second = remember(store, old), remember(store, new)
    crown(store, "m", "1", old)
    assert lookup.find_candidate(None, None) == (second, None)
    assert lookup.find_candidate(None, first.id) == (first, None)
    for name in ("v", "compress.v", f"{second.id}/v", str(new.path)):
        assert lookup.find_candidate(name, None) == (second, "v")
    for name in ("m/1", "champion", old.manifest.fingerprint[:10], f"{first.id}/compress.v"):
        assert lookup.find_candidate(name, None) == (first, "v")
    assert lookup.find_candidate("v", first.id) == (first, "v")
    assert lookup.find_candidate(first.id, None) == (first, None)
    with pytest.raises(ConfigError, match=f"'m/1' was made by another run than {second.id}"):
        lookup.find_candidate("m/1", second.id)


def test_a_title_is_named_by_its_model_or_by_its_champion(store: LocalStore, made: Made) -> None:
    base, variant = made("pretrain"), made("compress.v")
    crown(store, "m", "1", base)
    assert lookup.find_registered(None) == "m"
    crown(store, "n", "1", base)
    crown(store, "n", "2", variant)
    for name in ("n", "n@champion", "models:/n/2", variant.manifest.fingerprint[:8]):
        assert lookup.find_registered(name) == "n"
    with pytest.raises(ConfigError, match="there are 2 registered models"):
        lookup.find_registered(None)
    with pytest.raises(ConfigError, match="'n/1' is champion of no registered model"):
        lookup.find_registered("n/1")


@pytest.mark.slow
def test_aliases_are_asked_of_mlflow_which_others_write_too(
    smoke_store: Path, smoke_result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INGOT_STORE", str(smoke_store))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    champion = lookup.find_model("champion")
    assert champion.manifest.fingerprint == smoke_result["champion"]["fingerprint"]
    client = connect(TrackingConfig(), smoke_store)
    client.set_registered_model_alias("ingot-smoke", "tried", "1")
    try:
        assert lookup.find_model("ingot-smoke@tried") == lookup.find_model("models:/ingot-smoke/1") == champion
        assert lookup.find_model(smoke_result["id"]) == champion
    finally:
        client.delete_registered_model_alias("ingot-smoke", "tried")
