"""Model folders, tensor by tensor: neither side ever holds more than one tensor in memory.

A compressed folder has `ingot_compression.json` beside its weights: which method and parameters stored each layer, so
that it can be read back here and compressed again. Plain transformers does not need that file.

torch is imported where tensors are written: reports and `ingot show` read names and records alone.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from models.architectures.config import Family
from models.compression import registry
from models.compression.base import Packed
from pipelines.core.artifact import read_json
from pipelines.core.errors import IntegrityError, NumericError

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "ingot_compression.json"
RECORD_FORMAT = 1
PUBLIC_STEM = "model"
"""File stem of weights that plain transformers loads."""
PACKED_STEM = "packed"
"""File stem of weights that need `pipelines.modelio.load`; plain transformers finds no weights and says so."""
KV_CACHE_FILE = "kv_cache.safetensors"
"""How attention caches are quantized, in a variant of a `kv_cache` method; it holds no weights."""
SHARD_BYTES = 1 << 30
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of a number, by the name that safetensors has for its type."""
_NAMES = {
    "torch.int64": "I64",
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.int32": "I32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.int16": "I16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}
"""Types of tensors -> their names in safetensors files, where the data of tensors lies in this order."""
_ORDER = list(_NAMES.values())
_CHUNK = 1 << 20
_DECODERS = ("ForCausalLM", "LMHeadModel")
_ENCODERS = ("ForMaskedLM",)
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".ot", ".gguf"}
EXPECTED = f"a class that ends in {', '.join([*_DECODERS, *_ENCODERS])}"


class WeightReader:
    """The weights of a model folder as dense tensors, whatever layout stores them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = dict(_tensor_files(folder))
        record = read_record(folder)
        self._layers: dict[str, dict[str, Any]] = record["layers"] if record else {}
        self._rounding: list[str] | None = None

    @property
    def bytes(self) -> int:
        """Size of all weight files."""
        return sum(path.stat().st_size for path in set(self._files.values()))

    def names(self) -> list[str]:
        """Return the names of the dense parameters, packed layers as their `.weight`, sorted."""
        plain = [name for name in self._files if name.rpartition(".")[0] not in self._layers or name.endswith(".bias")]
        return sorted([*plain, *(f"{module}.weight" for module in self._layers)])

    def dense(self, name: str) -> Tensor:
        """Return one parameter as transformers stores it, dequantized if it is packed.

        Raises:
            IntegrityError: the folder does not hold it.
            NumericError: it holds a value that is not finite.
        """
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in self._layers:
            dense_OI = self.packed(module).dequantize()
            return dense_OI.T.contiguous() if self._layers[module].get("transposed") else dense_OI
        return self._read(name)

    def modules(self) -> list[str]:
        """Return the names of the packed layers, sorted."""
        return sorted(self._layers)

    def packed(self, module: str) -> Packed:
        """Return one packed layer."""
        method = registry.packing(self._layers[module]["method"])
        names = [n for n in self._files if n.rpartition(".")[0] == module and not n.endswith(".bias")]
        tensors = {name.rpartition(".")[2]: self._read(name) for name in names}
        return method.restore(tensors, method.Config.model_validate(self._layers[module]["config"]))

    def storages(self) -> list[str]:
        """Return one packed layer for each method and its parameters, sorted: layers stored alike are alike."""
        return sorted({self._kind(name): name for name in reversed(self.modules())}.values())

    def _kind(self, module: str) -> str:
        return json.dumps(self._layers[module], sort_keys=True)

    def rounding(self) -> list[str]:
        """Return the packed layers that round their inputs, sorted; layers stored alike are asked once."""
        if self._rounding is None:
            told = {self._kind(name): self.packed(name).rounds_inputs for name in self.storages()}
            self._rounding = [name for name in self.modules() if told[self._kind(name)]]
        return self._rounding

    def dense_bytes(self, name: str) -> int:
        """Return the size of a parameter as `dense` gives it; only a packed one is read for it."""
        if name.removesuffix(".weight") in self._layers:
            return self.dense(name).nbytes
        with _open(self._files[name]) as file:
            stored = file.get_slice(name)
            size: int = math.prod(stored.get_shape()) * _ITEM_BYTES[stored.get_dtype()]
        return size

    def refuse_not_finite(self) -> None:
        """Read every stored tensor once, so that a damaged model is refused before work is spent on it.

        Raises:
            NumericError: naming the first tensor with an infinite value or one that is no number.
        """
        for name in sorted(self._files):
            self._read(name)

    def _read(self, name: str) -> Tensor:
        if name not in self._files:
            raise IntegrityError(f"{self.folder} holds no tensor {name!r}", hint="delete the artifact and run again")
        with _open(self._files[name]) as file:
            # A copy, because the tensor itself keeps its whole file mapped for as long as it lives.
            tensor: Tensor = file.get_tensor(name).clone()
        refuse_not_finite(name, tensor, self._files[name])
        return tensor


class WeightWriter:
    """Writes tensors to one safetensors file, or to numbered shards with an index when they are large.

    Their bytes go to the disk as they come, and once more behind the header when a shard is complete: memory holds one
    tensor. The files are those that `safetensors.torch.save_file` writes, byte for byte.
    """

    def __init__(self, folder: Path, stem: str = PUBLIC_STEM, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._stem, self._limit = folder, stem, shard_bytes
        self._pending: dict[str, _Spooled] = {}
        self._size = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor.

        Raises:
            NumericError: it holds a value that is not finite.
        """
        import torch

        refuse_not_finite(name, tensor, self._folder)
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._size + size > self._limit:
            self._flush()
        self._pending[name] = _Spooled(_NAMES[str(tensor.dtype)], tuple(tensor.shape), self._size, size)
        with self._spool.open("ab") as stream:
            stream.truncate(self._size)  # what an attempt that was killed has left
            stream.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self._size += size

    def close(self) -> None:
        """Write what is pending, name the files, and write the index if there are several."""
        self._flush()
        if len(self._shards) == 1:
            self._part(0).rename(self._folder / f"{self._stem}.safetensors")
            return
        where: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            final = f"{self._stem}-{index + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._part(index).rename(self._folder / final)
            where |= dict.fromkeys(names, final)
        total = sum((self._folder / file).stat().st_size for file in set(where.values()))
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1, sort_keys=True)
        (self._folder / f"{self._stem}.safetensors.index.json").write_text(text, encoding="utf-8")

    @property
    def _spool(self) -> Path:
        return self._folder / f"{self._stem}.spool"

    def _part(self, index: int) -> Path:
        return self._folder / f"{self._stem}.part-{index}.safetensors"

    def _flush(self) -> None:
        ordered = sorted(self._pending.items(), key=lambda item: (_ORDER.index(item[1].dtype), item[0]))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, spooled in ordered:
            place = [end, end := end + spooled.bytes]
            header[name] = {"dtype": spooled.dtype, "shape": spooled.shape, "data_offsets": place}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with self._spool.open("rb") as source, self._part(len(self._shards)).open("wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for _, spooled in ordered:
                source.seek(spooled.start)
                for left in range(spooled.bytes, 0, -_CHUNK):
                    target.write(source.read(min(left, _CHUNK)))
        self._spool.unlink()
        self._shards.append(sorted(self._pending))
        self._pending, self._size = {}, 0


@dataclass(frozen=True)
class _Spooled:
    """A tensor whose bytes wait for their shard."""

    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    start: int
    bytes: int


def refuse_not_finite(name: str, tensor: Tensor, where: Path) -> None:
    """Refuse a weight with an infinite value or one that is no number: every method would spread it in silence.

    One pass over the values, at 7 to 12 GB/s of one core: the smallest and the largest are finite only if all are.

    Args:
        name: of the tensor, for the message.
        tensor: integers, truth values and values on the meta device are let through.
        where: file or folder, for the message.

    Raises:
        NumericError: naming the tensor.
    """
    import torch

    if not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
        return
    wide = tensor.detach() if tensor.element_size() > 1 else tensor.detach().float()  # 8-bit floats have no minimum
    if not torch.stack(torch.aminmax(wide)).isfinite().all():
        count = int((~wide.isfinite()).sum())
        raise NumericError(
            f"{where}: the weight {name} has {count} of {tensor.numel()} values that are infinite or no number",
            hint="take weights from before that happened: an earlier checkpoint or version of the model",
        )


def family_of(model: Path) -> Family:
    """Return the family of a model folder, from the architecture that its config.json names.

    Raises:
        IntegrityError: it names none that predicts tokens.
    """
    config = read_json(model / "config.json")
    if (family := family_in(config)) is None:
        raise IntegrityError(f"{model / 'config.json'} names {_named(config)}; expected is {EXPECTED}")
    return family


def family_in(config: Mapping[str, Any]) -> Family | None:
    """Return the family that a config.json names by its architecture; None for one that predicts no tokens."""
    (name, *_) = config.get("architectures") or [""]
    if name.endswith(_DECODERS):
        return "decoder"
    return "encoder" if name.endswith(_ENCODERS) else None


def _named(config: Mapping[str, Any]) -> str:
    return f"the architectures {config.get('architectures') or []}"


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a compressed folder; None for a dense one.

    Raises:
        IntegrityError: it was written by a newer checkout.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    record: dict[str, Any] = read_json(path)
    if record["format"] != RECORD_FORMAT:
        raise IntegrityError(f"{path} has format {record['format']}; this checkout reads {RECORD_FORMAT}")
    return record


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys: equal values give equal bytes."""
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path) -> None:
    """Copy everything that is not weights: config, generation config, tokenizer, chat template, settings in folders.

    Weights in other formats, pickles among them, stay behind.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(each for each in source.rglob("*") if each.is_file()):
        inside = path.relative_to(source)
        if len(inside.parts) > 1 and path.suffix != ".json":
            continue
        if path.name == RECORD or ".safetensors" in path.name or path.suffix in _OTHER_WEIGHTS:
            continue
        if any(part.startswith(".") for part in inside.parts):
            continue
        (target / inside).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / inside)


def _tensor_files(folder: Path) -> Iterator[tuple[str, Path]]:
    paths = sorted(path for path in folder.glob("*.safetensors") if path.name != KV_CACHE_FILE)
    if not paths:
        raise IntegrityError(f"{folder} holds no safetensors weights", hint="delete the artifact and run again")
    for path in paths:
        with _open(path) as file:
            yield from ((name, path) for name in file.keys())  # noqa: SIM118 - the handle is no mapping


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise IntegrityError(f"{path} is damaged: {error}", hint="`ingot verify` names every damaged file") from error
