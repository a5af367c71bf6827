"""Every parser of ours on damaged and invented input: a value, or an error of ours; never another, never a wrong value.

`make test` tries a few inputs each, the same every time; `make fuzz` sets INGOT_FUZZ and tries many, each time others.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows import recipe, recipe_schema
from flows.run_record import NodeRecord, Runs
from pipelines.core import artifact, project, run_stage
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError, IngotError, IntegrityError
from pipelines.core.request import StageRequest
from pipelines.data import records, shards, versioning
from pipelines.data.config import DataConfig
from pipelines.modelio.folder import WeightReader
from pipelines.registry import history
from pipelines.tracking import record as tracking_record
from pipelines.tracking.record import TrackingRecord

EXAMPLES = int(os.environ.get("INGOT_FUZZ", "20"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="INGOT_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
DVC = "outs:\n- md5: 0123456789abcdef0123456789abcdef.dir\n  size: 10\n  nfiles: 1\n  hash: md5\n  path: data\n"
SMOKE = (recipe.RECIPES / "smoke.toml").read_text(encoding="utf-8")

ODD = [b"", b"[" * 5000, b'{"a":' * 5000, b"\xef\xbb\xbf", b"null"]
ODD_VALUES = ["none", "-1", "1e999", "nan", "[[", "''", "0"]

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Return bytes with a few of them changed, cut out, doubled or put in, or others altogether."""
    if draw(st.integers(0, 9)) == 0:
        return draw(
            st.binary(max_size=60) | st.sampled_from([b"", b"[" * 5000, b'{"a":' * 5000, b"\xef\xbb\xbf", b"null"])
        )
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(len(content) - 1, 0)))
        end = draw(st.integers(start, min(start + 30, len(content))))
        content = content[:start] + draw(st.binary(max_size=4) | st.just(content[start:end] * 2)) + content[end:]
    return content


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """Return a JSON value in which one value, anywhere, is another one or gone."""
    value = copy.deepcopy(value)
    node, keys = value, list(value)
    while True:
        key = draw(st.sampled_from(keys))
        below = node[key]
        if isinstance(below, dict | list) and below and draw(st.integers(0, 3)):
            node, keys = below, list(below) if isinstance(below, dict) else list(range(len(below)))
            continue
        if draw(st.integers(0, 3)):
            node[key] = draw(values)
        else:
            del node[key]
        return value


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A small artifact."""
    build = tmp_path_factory.mktemp("build") / "payload"
    (build / "model").mkdir(parents=True)
    (build / "model" / "config.json").write_text('{"a": 1.5}')
    (build / "weights.bin").write_bytes(bytes(range(200)))
    facts: dict[str, Any] = {"stage": "toy", "node": "toy", "parents": {"x": "1" * 64}, "summary": {"loss": 1.5}}
    return artifact.publish(build, build.parent / "made", identity={"a": [1, 2.5, "x"], "b": None}, **facts)


@fuzz
@given(data=st.data())
def test_a_manifest_is_what_was_written_or_damaged(data: st.DataObject, published: Artifact) -> None:
    text = (published.path / artifact.MANIFEST).read_bytes()
    try:
        found = artifact.parse(data.draw(damaged(text)), "here")
    except IntegrityError:
        return
    assert found == published.manifest


@fuzz
@given(data=st.data())
def test_a_bit_that_flips_anywhere_in_an_artifact_is_found(
    data: st.DataObject, published: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("flipped") / "copy"
    shutil.copytree(published.path, folder)
    path = data.draw(st.sampled_from(sorted(each for each in folder.rglob("*") if each.is_file())))
    content = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"damaged|sha256|expected|schema"):
        artifact.load(folder).verify()


@pytest.fixture(scope="module")
def run_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The record of a run."""
    runs = Runs(tmp_path_factory.mktemp("store"))
    nodes = {"prepare": NodeRecord(stage="prepare", fingerprint="f" * 64, summary={"tokens": 5})}
    made = runs.start(
        recipe="smoke",
        overrides=["a=1"],
        config=recipe.resolve("smoke").model_dump(mode="json"),
        data_hash="x",
        nodes=nodes,
    )
    runs.finish(made, "done", 0)
    return (runs.folder(made.id) / "run.json").read_text()


@fuzz
@given(data=st.data())
def test_a_run_record_is_read_or_left_out(
    data: st.DataObject, run_text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    runs = Runs(tmp_path_factory.mktemp("store"))
    one = data.draw(st.booleans())
    text = json.dumps(data.draw(changed(json.loads(run_text)))).encode() if one else run_text.encode()
    content = text if one else data.draw(damaged(text))
    (runs.folder("one")).mkdir(parents=True)
    (runs.folder("one") / "run.json").write_bytes(content)
    for run in runs.all():
        assert run.state
        assert run.seconds is not None
        assert run.result is None or isinstance(run.result, str)
        run.unfinished  # noqa: B018 - only that it can be asked
    runs.unfinished()
    runs.last_of("smoke")
    with_or_without(lambda: runs.get("one"))


def with_or_without(call: Callable[[], Any]) -> Any:
    """Call, and take errors of ours for an answer; their messages are whole sentences of bounded length."""
    try:
        return call()
    except IngotError as error:
        assert 0 < len(str(error)) < 20_000  # noqa: PT017 - an error is one of two right answers
        return None


@fuzz
@given(data=st.data())
def test_a_recipe_is_a_configuration_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("recipe") / "mine.toml"
    path.write_bytes(data.draw(damaged(SMOKE.encode())))
    with_or_without(lambda: recipe.resolve(str(path)))
    with_or_without(lambda: project.read_toml(path))
    (path.parent / project.MARKER).write_bytes(path.read_bytes())
    with_or_without(lambda: project.settings(path.parent))


KEYS = sorted(
    f"{section}.{key}"
    for section in ("data", "prepare", "pretrain", "evaluate", "promote", "tracking", "compute", "store")
    for key in recipe_schema.schema()["$defs"].get(f"{section.capitalize()}Config", {}).get("properties", {"x": None})
)


@fuzz
@given(
    keys=st.lists(st.sampled_from([*KEYS, "pretrain.optimizer.lr", "compress.0.bits", "compress"]), max_size=2),
    odd=st.lists(st.text(max_size=12), max_size=1),
    value=st.text(max_size=20) | values.map(json.dumps) | st.sampled_from(ODD_VALUES),
)
def test_an_override_is_taken_or_refused(keys: list[str], odd: list[str], value: str) -> None:
    overrides = [f"{key}={value}" for key in [*keys, *odd]]
    with_or_without(lambda: recipe.resolve(*recipe.from_here("smoke", overrides, None)))


@fuzz
@given(content=damaged(DVC.encode()))
def test_a_dvc_file_names_a_hash_or_is_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("project")
    (folder / "data.dvc").write_bytes(content)
    found = with_or_without(lambda: versioning.data_hash(DataConfig(), folder))
    assert found is None or len(found.removesuffix(".dir")) == 32


@fuzz
@given(data=st.data())
def test_an_index_of_shards_is_read_or_damaged(
    data: st.DataObject, prepared: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("prepared") / "copy"
    shutil.copytree(prepared.path, folder)
    index = json.loads((folder / shards.INDEX).read_text())
    (folder / shards.INDEX).write_text(json.dumps(data.draw(changed(index))))
    reader = with_or_without(lambda: shards.ShardReader(folder, "train"))
    assert reader is None or len(reader) >= 0


@fuzz
@given(data=st.data())
def test_a_line_of_a_corpus_is_a_document_or_malformed(data: st.DataObject) -> None:
    line = json.dumps({"id": "1", "text": "Some text.", "source": "s", "license": "l", "meta": {"a": [1]}}).encode()
    try:
        found = records.parse(data.draw(damaged(line)), "x:1")
    except records.MalformedRecordError as error:
        assert str(error)  # noqa: PT017 - as above
        return
    assert isinstance(found.text, str)
    found.to_json()


@pytest.fixture(scope="module")
def weights() -> bytes:
    """A file of two tensors."""
    import torch
    from safetensors.torch import save

    return save({"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16)})


@fuzz
@given(data=st.data())
def test_weights_are_tensors_or_damaged(
    data: st.DataObject, weights: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Length of the header, names, types, shapes, offsets, values: whatever they say by now."""
    folder = tmp_path_factory.mktemp("model")
    length = 8 + int.from_bytes(weights[:8], "little")
    whole = data.draw(st.booleans())
    damage = data.draw(damaged(weights)) if whole else data.draw(damaged(weights[:length])) + weights[length:]
    (folder / "model.safetensors").write_bytes(damage)

    def read() -> dict[str, Any]:
        reader = WeightReader(folder)
        return {name: (reader.dense(name), reader.dense_bytes(name)) for name in reader.names()}

    for tensor, size in (with_or_without(read) or {}).values():
        assert tensor.nbytes == size


@fuzz
@given(data=st.data())
def test_a_stage_request_is_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    request = StageRequest(
        stage="prepare", node="prepare", fingerprint="f", configuration={"a": 1}, inputs={}, data_hash="x", store="/s"
    )
    path = tmp_path_factory.mktemp("request") / "request.json"
    path.write_bytes(data.draw(damaged(request.model_dump_json().encode())))
    try:
        assert isinstance(run_stage._read([str(path)]), StageRequest)
    except ConfigError as error:
        assert str(path) in str(error)  # noqa: PT017 - as above


@fuzz
@given(content=damaged(b'{"run_id": "r", "status": "RUNNING", "stages": {}, "files": {}, "pending": true}'))
def test_what_mlflow_lacks_is_read_or_left_out(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    store = tmp_path_factory.mktemp("store")
    (path := tracking_record.path_of(store, "r")).parent.mkdir(parents=True)
    path.write_bytes(content)
    assert all(isinstance(each, TrackingRecord) for each in tracking_record.load_all(store))


@fuzz
@given(data=st.data())
def test_the_succession_of_champions_is_read_or_damaged(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = tmp_path_factory.mktemp("store")
    for number in ("1", "2"):
        history.append(store, "m", history.PROMOTE, version=number, why="better", fingerprint="f" * 64)
    path = store / history.HISTORY
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    for ask in (history.read, history.champion, history.champions):
        with_or_without(lambda ask=ask: ask(store, "m"))
    with_or_without(lambda: history.models(store))
