"""GGUF: one file for llama.cpp and everything built on it (the decoder only).

A decoder here is a Llama, so its tensors are stored under the architecture `llama`. Two things differ from the
safetensors folder: llama.cpp rotates neighbouring pairs of a head's components where transformers rotates its two
halves, so the rows of the query and key matrices are reordered; and a quantized matrix is stored in blocks of 32
weights of a row with one float16 scale each (q8_0: 8.5 bits a weight, q4_0: 4.5 bits).

A variant is written from its dequantized weights: exactly as f32, and rounded a second time as anything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray

from models.architectures.describe import beyond_layout
from pipelines.core.artifact import read_json
from pipelines.core.errors import ConfigError
from pipelines.data.encoder import word_pattern
from pipelines.data.tokenizer import PATTERNS
from pipelines.modelio.folder import WeightReader, family_in

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

Precision = Literal["f32", "f16", "q8_0", "q4_0"]
BLOCK = 32
"""Weights that share a scale; a matrix with other row lengths is stored as f16."""
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7}
"""`llama_ftype` of llama.cpp."""
_SPLITTERS = {
    PATTERNS["llama3", False]: "smaug-bpe",  # `llama-bpe` takes a word that is a token whole, whatever the merges say
    PATTERNS["llama3", True]: "qwen2",
    PATTERNS["gpt2", False]: "gpt-2",
    PATTERNS["gpt2", True]: "smollm",
}
"""What a word is -> llama.cpp's name of the same rule."""
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5
"""Token types of llama.cpp; an unused id has a row in the token matrix and no token in the tokenizer."""


def interleave(weight_OI: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorder the rows of a query or key matrix from rotated halves to rotated pairs.

    Args:
        weight_OI: rows of one head lie together; O is a multiple of 2 x heads.
        heads: heads of this matrix: query heads, or key heads.
    """
    rows, columns = weight_OI.shape
    return weight_OI.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def stored_type(name: str, shape: tuple[int, ...], precision: Precision) -> str:
    """Return the type that a tensor is stored in.

    Gains of norms stay f32, which llama.cpp requires. With q4_0 the token matrices are stored as q8_0: their error
    reaches every logit at once.
    """
    if len(shape) == 1:
        return "f32"
    if precision in {"q8_0", "q4_0"} and shape[-1] % BLOCK:
        return "f16"
    if precision == "q4_0" and name in {"token_embd.weight", "output.weight"}:
        return "q8_0"
    return precision


def write(
    model: Path, target: Path, precision: Precision = "f16", *, title: str = "model", licence: str = "other"
) -> dict[str, int]:
    """Write a decoder's folder as one GGUF file.

    Args:
        model: model folder with its tokenizer, in any layout of this project.
        target: the file.
        precision: how matrices are stored.
        title: what llama.cpp and the programs on it call the model.
        licence: as Hugging Face names licences.

    Returns:
        Number of tensors by stored type.

    Raises:
        ConfigError: no decoder, or a tokenizer that llama.cpp would read differently.
    """
    import gguf

    config = _config(model)
    writer = gguf.GGUFWriter(target, "llama", use_temp_file=True)
    writer.add_name(title)
    writer.add_license(licence)
    _add_shape(writer, config)
    writer.add_file_type(_FILE_TYPES[precision])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, read_json(model / "tokenizer.json"), config)
    used: dict[str, int] = {}
    for name, values in _tensors(model, config):
        kind = stored_type(name, values.shape, precision)
        used[kind] = used.get(kind, 0) + 1
        ggml = _ggml_type(kind)
        writer.add_tensor(name, gguf.quants.quantize(values, ggml), raw_dtype=ggml)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return used


def _config(model: Path) -> dict[str, Any]:
    config: dict[str, Any] = read_json(model / "config.json")
    if family_in(config) == "encoder":
        raise ConfigError(
            f"{config.get('architectures')} cannot be written as GGUF: llama.cpp has no masked language models",
            hint="`ingot export --format onnx` writes encoders",
        )
    kind = config.get("model_type")
    lost = beyond_layout(config) if kind == "llama" else [f"model_type is {kind!r}"]
    if lost:
        raise ConfigError(
            f"{', '.join(lost)}: what is written here is a plain Llama, and would compute another model",
            hint="`ingot export --format hf` writes the folder, which llama.cpp's own convert_hf_to_gguf.py reads",
        )
    return config


def _tensors(model: Path, config: dict[str, Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield name and values (float32) of every tensor, one in memory at a time."""
    import gguf

    reader = WeightReader(model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name in reader.names():
        target = names.get_name(name, try_suffixes=(".weight",))
        if target is None:
            raise ConfigError(f"{name} has no place in the architecture `llama` of llama.cpp")
        values = reader.dense(name).float().numpy()
        rotated_heads = heads.get(name.split(".")[-2])
        yield target, interleave(values, rotated_heads) if rotated_heads else values


def _add_shape(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    # A variant with pruned heads keeps the size of a head: it is no longer width / heads, which llama.cpp would assume.
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    """Describe the byte-level BPE; documents start with `<|bos|>` in training, so llama.cpp is told to add it."""
    model, splitter = tokenizer["model"], _SPLITTERS.get(word_pattern(tokenizer.get("pre_tokenizer")) or "")
    if model.get("type") != "BPE" or splitter is None or tokenizer.get("normalizer"):
        raise ConfigError(
            "the tokenizer is none of the byte-level BPEs of the prepare stage; llama.cpp would cut texts differently",
            hint="`ingot export --format hf` keeps any tokenizer",
        )
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    by_id = {number: text for text, number in model["vocab"].items()} | special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    ids = range(config["vocab_size"])
    writer.add_token_list([by_id.get(n, f"<|unused-{n}|>") for n in ids])
    writer.add_token_types([_CONTROL if n in special else _NORMAL if n in by_id else _UNUSED for n in ids])
    writer.add_token_merges(_merges(model))
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(True)


def _merges(model: dict[str, Any]) -> list[str]:
    """Return the merges; llama.cpp demands one, and splits again what it joined to no token of the vocabulary."""
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return merges or ["\u0100 \u0100"]


def _ggml_type(kind: str) -> GGMLQuantizationType:
    import gguf

    return gguf.GGMLQuantizationType[kind.upper()]
