"""What reads a model folder, in words and as a snippet: for model cards and for `ingot export`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.core.artifact import Artifact, read_json
from pipelines.modelio.folder import KV_CACHE_FILE, PACKED_STEM

LOADER = {"decoder": "AutoModelForCausalLM", "encoder": "AutoModelForMaskedLM"}
"""Family -> the auto class of transformers that loads it."""
_PLAIN = """\
from transformers import AutoTokenizer, {loader}

model = {loader}.from_pretrained({path}){note}
tokenizer = AutoTokenizer.from_pretrained({path})
"""
_OURS = """\
from pathlib import Path

from transformers import AutoTokenizer
from pipelines.modelio.load import load_model  # run in a checkout of Ingot

model = load_model(Path({path})){note}
tokenizer = AutoTokenizer.from_pretrained({path})
"""
_NOTE = "  # path: `ingot list models --json`"
_CACHE = """\
output = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=50)  # makes a quantized cache itself
cache = model.new_cache()  # or keep one: model(ids, past_key_values=cache, use_cache=True)
print(cache.stored_bytes)
"""


@dataclass(frozen=True)
class Loading:
    """How one model folder is loaded."""

    packed: bool
    """The weights are in a layout of ours."""
    cache: bool
    """The attention cache is quantized."""
    packages: tuple[str, ...] = ("torch", "transformers")
    """What has to be installed to load it."""

    @property
    def plain(self) -> bool:
        """Whether plain transformers computes what was measured."""
        return not (self.packed or self.cache)

    @property
    def needs(self) -> str:
        """The packages to install, as a sentence."""
        return f"It needs `pip install {' '.join(self.packages)}`."

    @property
    def sentence(self) -> str:
        """What to know before loading."""
        if self.plain:
            return f"Load it with plain transformers; no code of Ingot is needed. {self.needs}"
        if not self.cache:
            return (
                "Its weights are in packed*.safetensors, a layout that no public loader reads; it is described by "
                "ingot_compression.json beside them. Load it with Ingot."
            )
        alone = (
            "Plain transformers does not find the packed weights either."
            if self.packed
            else "Plain transformers loads the weights but ignores that file: it keeps an ordinary cache of full size, "
            "and computes what the base model computes."
        )
        return (
            f"What was compressed is the attention cache, by the tables in {KV_CACHE_FILE}. {alone} Load it with Ingot "
            "to have the quantized cache that was measured; its own caches are made by `generate` or `new_cache()`, "
            "and caches of other classes are refused."
        )

    def snippet(self, loader: str, path: str | None = None) -> str:
        """Return Python that loads the model.

        Args:
            loader: the auto class of transformers that its family has.
            path: its folder; None leaves it to the reader, and says where to look it up.
        """
        place = {"path": "path", "note": _NOTE} if path is None else {"path": repr(path), "note": ""}
        if self.plain:
            return _PLAIN.format(loader=loader, **place)
        return _OURS.format(**place) + (_CACHE if self.cache else "")


def of_files(names: Iterable[str]) -> Loading:
    """Return how a model folder with these file names is loaded."""
    leaves = [name.rpartition("/")[2] for name in names]
    packed = any(leaf.startswith(PACKED_STEM) and leaf.endswith(".safetensors") for leaf in leaves)
    return Loading(packed, KV_CACHE_FILE in leaves)


def of(model: Artifact) -> Loading:
    """Return how the model of a pretrain or compress artifact is loaded."""
    how = of_files(name for name in model.manifest.files if name.startswith("model/"))
    return replace(how, packages=(*how.packages, *_quantizers(model.path / "model" / "config.json")))


def _quantizers(config: Path) -> tuple[str, ...]:
    """Return the packages that transformers reads a quantized folder with, by the names it knows them by."""
    settings = read_json(config) if config.is_file() else {}
    method = (settings.get("quantization_config") or {}).get("quant_method")
    return () if method is None else (str(method),)
