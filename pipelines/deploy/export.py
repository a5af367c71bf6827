"""Write a model of the store to a place of the user's, in one of four formats; appears complete or not at all."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.deploy import companions
from pipelines.modelio import load_instructions

PRECISIONS = {
    "hf": ("as stored",),
    "gguf": ("f16", "f32", "q8_0", "q4_0"),
    "onnx": ("fp32", "int8"),
    "torchao": ("int8", "int8-dynamic", "int4"),
}
"""Format -> how its matrices can be stored, the default first."""


@dataclass(frozen=True)
class About:
    """What an export says of the model besides what its files say."""

    name: str
    """What programs show: the registered model and version, or the node."""
    card: str
    """Model card, Markdown."""
    licence: str = "other"
    """As Hugging Face names licences."""


def write(
    source: Artifact,
    destination: Path,
    file_format: str = "hf",
    precision: str | None = None,
    *,
    about: About | None = None,
    weights_only: bool = False,
) -> str:
    """Write a model and return a sentence that says how to load it, and what of it is not in the file.

    Args:
        source: a pretrain or compress artifact; verified before anything is read.
        destination: folder to create (hf, onnx, torchao) or file (gguf).
        file_format: `hf`: the model folder as it is; `gguf`: one file for llama.cpp (decoder); `onnx`: a folder for
            onnxruntime (encoder); `torchao`: a folder for transformers with torchao.
        precision: one of `PRECISIONS[file_format]`; None for its default.
        about: name, card and licence; None names it after its node.
        weights_only: go on where the format leaves out rounded inputs or a quantized cache.

    Raises:
        ConfigError: unknown format or precision, an existing destination, a family that the format does not have, or
            something left out without `weights_only`.
        IntegrityError: a file of the artifact is damaged.
    """
    used = check(destination, file_format, precision)
    source.verify()
    lost = _left_out(source, file_format, used, allowed=weights_only)
    building = destination.with_name(f".{destination.name}.building-{os.getpid()}")
    try:
        sentence = _WRITERS[file_format](source, building, used, about or _plain(source))
        building.rename(destination)
    finally:
        _remove(building)
    return sentence.format(str(destination)) + lost


def check(destination: Path, file_format: str, precision: str | None) -> str:
    """Return the precision that will be used.

    Raises:
        ConfigError: see `write`.
    """
    if file_format not in PRECISIONS:
        raise ConfigError(f"there is no format {file_format!r}", hint=f"formats: {', '.join(PRECISIONS)}")
    valid = PRECISIONS[file_format]
    if precision is not None and precision not in valid:
        raise ConfigError(f"{file_format} has no precision {precision!r}", hint=f"valid: {', '.join(valid)}")
    if destination.exists():
        raise ConfigError(f"{destination} exists", hint="give a path that does not exist yet")
    return precision or valid[0]


def _plain(source: Artifact) -> About:
    node = source.manifest.node
    return About(node, f"# {node}\n\n{load_instructions.of(source).sentence}\n")


def _hf(source: Artifact, building: Path, _: str, about: About) -> str:
    shutil.copytree(source.path / "model", building)
    companions.finish(building, about.card)
    how = load_instructions.of(source)
    if how.plain:
        return f"load it with transformers: from_pretrained({{!r}}); needs: pip install {' '.join(how.packages)}"
    return f"{how.sentence} pipelines.modelio.load.load_model(Path({{!r}})) in this checkout"


def _gguf(source: Artifact, building: Path, precision: str, about: About) -> str:
    from pipelines.deploy import gguf

    building.parent.mkdir(parents=True, exist_ok=True)
    used = gguf.write(source.path / "model", building, precision, title=about.name, licence=about.licence)  # type: ignore[arg-type]
    stored = ", ".join(f"{count} tensors {kind}" for kind, count in sorted(used.items()))
    return f"{stored}; load it with llama.cpp: llama-cli -m {{}}"


def _onnx(source: Artifact, building: Path, precision: str, about: About) -> str:
    from pipelines.deploy import onnx

    building.mkdir(parents=True)
    onnx.write(source.path / "model", building, precision)  # type: ignore[arg-type]
    companions.finish(building, about.card)
    return f"{precision}; load it with onnxruntime: InferenceSession('{{}}/{onnx.MODEL}')"


def _torchao(source: Artifact, building: Path, precision: str, about: About) -> str:
    from pipelines.deploy import torchao

    building.mkdir(parents=True)
    used = torchao.write(source.path / "model", building, precision)  # type: ignore[arg-type]
    companions.finish(building, about.card)
    stored = ", ".join(f"{count} matrices {how}" for how, count in used.items() if count)
    return f"{stored} ({precision}); load it with transformers and torchao: from_pretrained({{!r}})"


_WRITERS: dict[str, Callable[[Artifact, Path, str, About], str]] = {
    "hf": _hf,
    "gguf": _gguf,
    "onnx": _onnx,
    "torchao": _torchao,
}


def _left_out(source: Artifact, file_format: str, precision: str, *, allowed: bool) -> str:
    """Return what to add to the sentence.

    Raises:
        ConfigError: something is left out and `allowed` is false.
    """
    if file_format == "hf":
        return ""
    from pipelines.deploy import torchao, unsupported

    same = functools.partial(torchao.rounds_same_inputs, precision=precision if file_format == "torchao" else "")
    return unsupported.refuse(unsupported.of(source.path / "model", same), file_format, allowed=allowed)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
