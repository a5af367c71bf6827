"""The `fetch` stage: the model that a run starts from, as an artifact of the store like any other.

A node of the graph only where `base.from` is set: `fetch` where training goes on from it, `base` where it is itself the
model that is measured and compressed. Compressed weights are turned back into dense ones, so that what
trains is exactly the model that was measured and promoted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from pipelines.core.artifact import Artifact, read_json
from pipelines.core.errors import IntegrityError
from pipelines.core.stage import StageContext, Summary
from pipelines.registry import initial_weights
from pipelines.registry.config import FetchConfig
from pipelines.registry.package import MODEL_FOLDER
from pipelines.tracking.config import config_of


def run(config: FetchConfig, inputs: Mapping[str, Artifact], out_dir: Path, context: StageContext) -> Summary:  # noqa: ARG001 - it has none
    """Copy the model folder into the artifact; see `pipelines.core.stage`.

    Raises:
        IntegrityError: the weights are no longer those that the plan was made for.
        ConfigError: the model is gone.
        NumericError: a weight is not finite.
    """
    with initial_weights.opened(config.place, config_of(context.tracking), context.store) as folder:
        if (present := initial_weights.folder_digest(folder)) != config.weights:
            raise IntegrityError(
                f"{config.place} holds weights {present[:16]}, the plan was made for {config.weights[:16]}",
                hint="its files were changed; run again to plan with what is there now",
            )
        compressed = copy_dense(folder, out_dir / MODEL_FOLDER)
    return {
        "source": config.place,
        "origin": config.origin or None,
        "weights": config.weights,
        "dequantized": compressed,
    }


def copy_dense(folder: Path, target: Path) -> bool:
    """Copy a model folder with dense weights under the names of its modules; tell whether they were packed.

    Files whose tensors need no change are copied as they are, shards and their index too.
    """
    from pipelines.modelio import stored_names
    from pipelines.modelio.folder import WeightReader, WeightWriter, copy_companions, read_record

    reader = WeightReader(folder)
    reader.refuse_not_finite()
    names, packed = stored_names.mapping(folder), read_record(folder) is not None
    copy_companions(folder, target)
    if not packed and all(stored == name for stored, name in names.items()):
        for path in folder.glob("*.safetensors*"):
            shutil.copyfile(path, target / path.name)
        return False
    writer = WeightWriter(target)
    for stored, name in names.items():
        writer.add(name, reader.dense(stored).float() if packed else reader.dense(stored))
    writer.close()
    if packed:
        _forget_compression(target / "config.json")
    return packed


def _forget_compression(path: Path) -> None:
    """Take what tells transformers to expect packed weights out of a config.json."""
    settings = read_json(path)
    settings.pop("quantization_config", None)
    path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
