"""A corpus from elsewhere: this machine, the web, S3; what is not taken is named, faults are told apart."""

from __future__ import annotations

import http.server
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from pipelines.core.errors import ConfigError, TransientError
from pipelines.data import importing, reader, recording, versioning
from pipelines.data.config import DataConfig
from pipelines.data.records import Document
from tests.s3_server import S3Server

HERE = DataConfig()
LINE = b'{"text": "one"}\n'


def texts(folder: Path) -> list[str]:
    return [record.text for record in reader.read(folder) if isinstance(record, Document)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "texts of 100%"
    for name in ("a.jsonl", "letters/b.jsonl", "letters/c.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b'{"text": "%s"}\n' % name.encode())
    return folder


def test_a_folder_is_taken_as_it_is_and_what_is_not_is_named(source: Path, tmp_path: Path) -> None:
    (source / "picture.png").write_bytes(b"\x89PNG\r\n")
    (source / ".hidden").write_text("x")
    (source / ".git").mkdir()
    (source / "nothing.txt").write_text("")
    (source / "old.txt").write_bytes("caf\xe9".encode("latin-1"))
    (source / "dangling.txt").symlink_to(tmp_path / "nowhere")
    (source / "circle").symlink_to(source)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.jsonl").write_bytes(LINE)
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    taken = importing.bring(str(source), tmp_path / "data", tmp_path / "scratch")
    brought = {p.relative_to(tmp_path / "data").as_posix(): p for p in (tmp_path / "data").rglob("*") if p.is_file()}
    assert set(brought) == {"a.jsonl", "letters/b.jsonl", "letters/c.txt", "linked/d.jsonl"}
    assert all(path.read_bytes() == (source / name).read_bytes() for name, path in brought.items())
    left = {one.name: one.reason for one in taken.left_out}
    assert set(left) == {"picture.png", ".hidden", ".git/", "nothing.txt", "old.txt", "dangling.txt", "circle/"}
    said = importing.summary(taken)
    assert "JSON Lines: 4 files" in said
    assert "not taken: 1 x a picture; it is picture.png" in said
    assert not list((tmp_path / "scratch").glob("*"))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl", {"a.jsonl"}),
        ("**/*.jsonl", {"a.jsonl", "letters/b.jsonl"}),
        ("let*/[bc].*", {"letters/b.jsonl", "letters/c.txt"}),
        ("letters/c.txt", {"c.txt"}),
    ],
)
def test_patterns_and_single_files(source: Path, tmp_path: Path, pattern: str, names: set[str]) -> None:
    importing.bring(f"{source}/{pattern}", tmp_path / "data", tmp_path / "scratch")
    assert {p.relative_to(tmp_path / "data").as_posix() for p in (tmp_path / "data").rglob("*") if p.is_file()} == names


@pytest.mark.parametrize("name", ["nowhere", "no*.jsonl", "pictures"])
def test_nothing_is_refused_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ConfigError, match=r"does not exist|has no file|1 x a picture: a\.png"):
        importing.bring(str(tmp_path / name), tmp_path / "data", tmp_path / "scratch")
    assert not (tmp_path / "data").exists()


# ---- the web


class _Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; answers some names with faults."""

    down: ClassVar[set[str]] = set()
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if "secret" in self.path:
            self.send_error(403)
        elif "broken" in self.path or self.path in self.down:
            self.send_error(503)
        elif "cut" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(LINE)
        else:
            super().do_GET()

    def do_HEAD(self) -> None:
        self.send_error(405)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is inherited
        pass


@pytest.fixture
def web(source: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *arguments: _Server(*arguments, directory=str(source))
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_file_comes_from_the_web_under_its_name(web: str, tmp_path: Path) -> None:
    importing.bring(f"{web}/letters/b.jsonl?download=true", tmp_path / "data", tmp_path / "scratch")
    assert texts(tmp_path / "data") == ["letters/b.jsonl"]
    assert (tmp_path / "data" / "b.jsonl").is_file()


def test_a_page_of_links_is_a_folder(web: str, tmp_path: Path) -> None:
    importing.bring(f"{web}/letters/", tmp_path / "data", tmp_path / "scratch")
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"b.jsonl", "c.txt"}


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("nothing.jsonl", ConfigError, "nothing at"),
        ("secret.jsonl", ConfigError, "403"),
        ("broken.jsonl", TransientError, "503"),
        ("cut.jsonl", TransientError, "cannot be reached"),
    ],
)
def test_faults_of_a_web_server_are_told_apart(
    web: str, tmp_path: Path, name: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        importing.bring(f"{web}/{name}", tmp_path / "data", tmp_path / "scratch")
    assert not (tmp_path / "data").exists()


def test_what_has_arrived_is_not_fetched_again(web: str, tmp_path: Path) -> None:
    _Server.asked.clear()
    _Server.down.add("/letters/c.txt")
    with pytest.raises(TransientError, match="503") as caught:
        importing.bring(f"{web}/letters/", tmp_path / "data", tmp_path / "scratch")
    assert "not fetched again" in str(caught.value.hint)
    _Server.down.clear()
    importing.bring(f"{web}/letters/", tmp_path / "data", tmp_path / "scratch")
    assert len(texts(tmp_path / "data")) == 2
    assert _Server.asked.count("/letters/b.jsonl") == 1


def test_no_server_is_a_fault_that_may_pass_and_no_protocol_one_of_the_address(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(TransientError, match="cannot be reached"):
        importing.bring(f"http://127.0.0.1:{port}/a.jsonl", tmp_path / "data", tmp_path / "scratch")
    with pytest.raises(ConfigError, match="pip install adlfs"):
        importing.bring("abfs://container/texts", tmp_path / "data", tmp_path / "scratch")
    with pytest.raises(ConfigError, match="nonsense"):
        importing.bring("nonsense://texts", tmp_path / "data", tmp_path / "scratch")


# ---- S3


@pytest.fixture
def bucket(s3: S3Server, source: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of a bucket with the source in it."""
    import s3fs

    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    for path in source.rglob("*"):
        if path.is_file():
            system.put_file(str(path), f"corpus/import/{path.relative_to(source).as_posix()}")
    return "s3://corpus/import"


def test_a_corpus_on_s3_is_imported_and_recorded(bucket: str, clone: Path) -> None:
    recorded = recording.import_url(HERE, clone, bucket)
    assert recorded["taken"] == "JSON Lines: 3 files"
    assert set(versioning.verify(HERE, clone).md5) == {"a.jsonl", "letters/b.jsonl", "letters/c.txt"}
    shutil.rmtree(clone / "data")
    assert recording.import_url(HERE, clone, f"{bucket}/**/*.jsonl")["files"] == 2
    shutil.rmtree(clone / "data")
    assert recording.import_url(HERE, clone, f"{bucket}/a.jsonl")["files"] == 1
    assert texts(clone / "data") == ["a.jsonl"]


@pytest.mark.parametrize("place", ["s3://corpus/nowhere", "s3://no-such-bucket/texts", "s3://corpus/import/*.parquet"])
def test_nothing_on_s3_is_a_slip_of_the_address(bucket: str, tmp_path: Path, place: str) -> None:
    with pytest.raises(ConfigError, match="nothing at"):
        importing.bring(place, tmp_path / "data", tmp_path / "scratch")


def test_an_s3_server_that_is_down_is_a_fault_that_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for name, value in (("AWS_ACCESS_KEY_ID", "k"), ("AWS_SECRET_ACCESS_KEY", "s")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    with pytest.raises(TransientError, match="cannot be reached"):
        importing.bring("s3://corpus/texts", tmp_path / "data", tmp_path / "scratch")
