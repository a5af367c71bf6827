"""The folder that a registered version holds: an MLflow `transformers` model around the untouched model folder.

    MLmodel, requirements.txt, conda.yaml, python_env.yaml, input_example.json    MLflow's own description
    model/                   the artifact's model folder, byte for byte
    components/tokenizer/    the tokenizer's files again, where MLflow looks for them
    ingot/                   manifest.json, evidence, model_card.md: where it comes from and what it was judged by

Written without loading the model, so it costs a copy and neither torch nor memory. Loading needs MLflow and
transformers, not this checkout, and no pickle.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core.artifact import MANIFEST, Artifact, Manifest, read_json
from pipelines.core.errors import IntegrityError
from pipelines.core.garbage import FETCHED
from pipelines.registry import evidence as evidence_of
from pipelines.registry.evidence import OURS, Evidence

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MODEL_FOLDER = "model"
CARD = "model_card.md"
_TASKS = {
    "decoder": ("text-generation", "TextGenerationPipeline", "KING HENRY:\n"),
    "encoder": ("fill-mask", "FillMaskPipeline", "To be, or not to be, that is the <|mask|>"),
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_PACKAGES = ("mlflow", "torch", "transformers", "compressed-tensors", "accelerate")


def build(model: Artifact, evidence: Evidence, card: str, folder: Path) -> None:
    """Write the folder to register.

    Args:
        model: artifact of the pretrain or compress stage.
        evidence: what it was judged by.
        card: model card, Markdown.
        folder: where to write; must not exist.
    """
    source = model.path / MODEL_FOLDER
    shutil.copytree(source, folder / MODEL_FOLDER, copy_function=_link)
    tokenizer = folder / "components" / "tokenizer"
    tokenizer.mkdir(parents=True)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            _link(source / name, tokenizer / name)
    ours = folder / OURS
    evidence_of.save(evidence, ours)
    shutil.copyfile(model.path / MANIFEST, ours / MANIFEST)
    (ours / CARD).write_text(card, encoding="utf-8")
    _describe(folder, source, evidence)


@contextlib.contextmanager
def downloaded(client: MlflowClient, uri: str, version: ModelVersion, part: str, store_root: Path) -> Iterator[Path]:
    """Download a part of a registered version into the store's scratch for the length of the block.

    Args:
        client: connection to MLflow.
        uri: where MLflow is.
        version: the registered version.
        part: file or folder below what `build` wrote; empty for everything.
        store_root: root of the store.

    Raises:
        FileNotFoundError: the registry answers, and has no such part.
    """
    source = client.get_model_version_download_uri(version.name, str(version.version))
    scratch_root = store_root / "scratch"
    scratch_root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=FETCHED, dir=scratch_root))
    try:
        yield _download(f"{source}/{part}".rstrip("/"), scratch, uri)
    finally:
        shutil.rmtree(scratch)


def _download(place: str, scratch: Path, uri: str) -> Path:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    try:
        return Path(download_artifacts(artifact_uri=place, dst_path=str(scratch), tracking_uri=uri))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise FileNotFoundError(f"{place} is not there") from error
    except OSError as error:
        # MLflow's word for a file that its own folder does not have is an OSError without a number.
        if isinstance(error, RequestException | ConnectionError) or error.errno not in {None, errno.ENOENT}:
            raise
        raise FileNotFoundError(f"{place} is not there") from error


def hashes_of(model: Manifest) -> dict[str, str]:
    """Return file name -> sha256 of what the folder `model/` must hold."""
    prefix = MODEL_FOLDER + "/"
    return {name: record.sha256 for name, record in model.files.items() if name.startswith(prefix)}


def _describe(folder: Path, source: Path, evidence: Evidence) -> None:
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    task, pipeline, example = _TASKS[evidence.family]
    (folder / "input_example.json").write_text(json.dumps([example]), encoding="utf-8")
    (folder / "serving_input_example.json").write_text(json.dumps({"inputs": [example]}), encoding="utf-8")
    described = Model(
        signature=ModelSignature(inputs=Schema([ColSpec("string")]), outputs=Schema([ColSpec("string")])),
        saved_input_example_info={
            "artifact_path": "input_example.json",
            "serving_input_path": "serving_input_example.json",
            "type": "json_object",
        },
        metadata={"fingerprint": evidence.fingerprint, "digest": evidence.digest},
    )
    described.add_flavor(
        "transformers",
        transformers_version=metadata.version("transformers"),
        code=None,
        task=task,
        instance_type=pipeline,
        pipeline_model_type=_architecture(source),
        source_model_name=evidence.name,
        model_binary=MODEL_FOLDER,
        components=["tokenizer"],
        tokenizer_type=_tokenizer_type(source),
    )
    described.add_flavor(
        "python_function",
        loader_module="mlflow.transformers",
        python_version=platform.python_version(),
        env={"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
    )
    described.model_size_bytes = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    described.save(str(folder / "MLmodel"))
    _write_environment(folder)


def _write_environment(folder: Path) -> None:
    """Write the packages that loading needs, with the versions of this environment."""
    import yaml

    requirements = [f"{name}=={metadata.version(name).partition('+')[0]}" for name in _PACKAGES]
    python = platform.python_version()
    environment: dict[str, Any] = {
        "name": "mlflow-env",
        "channels": ["conda-forge"],
        "dependencies": [f"python={python}", "pip", {"pip": requirements}],
    }
    build_with = {"python": python, "build_dependencies": ["pip"], "dependencies": ["-r requirements.txt"]}
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    (folder / "conda.yaml").write_text(yaml.safe_dump(environment, sort_keys=False), encoding="utf-8")
    (folder / "python_env.yaml").write_text(yaml.safe_dump(build_with, sort_keys=False), encoding="utf-8")


def _architecture(source: Path) -> str:
    try:
        return str(read_json(source / "config.json")["architectures"][0])
    except (OSError, TypeError, KeyError, IndexError) as error:
        raise IntegrityError(f"{source / 'config.json'} does not name its architecture: {error!r}") from error


def _tokenizer_type(source: Path) -> str:
    settings = read_json(source / "tokenizer_config.json")
    return str(settings.get("tokenizer_class", "PreTrainedTokenizerFast"))


def _link(source: str | Path, target: str | Path) -> None:
    """Copy without copying bytes where the file system allows it; the copy is only read."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
