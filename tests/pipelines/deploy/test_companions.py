"""An exported folder in the hands of others: transformers' pipeline, batches, caches, cards and what must be there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from pipelines.core.artifact import Artifact
from pipelines.data import tokenizer as tokenization
from pipelines.deploy import companions, export
from pipelines.deploy.export import About
from pipelines.registry import model_card

MakeModel = MakeVariant = Callable[..., Artifact]
PROMPTS = ["the ark", "1611 AD, rooms shalt thou make", "gopher wood shall thou make in it -- thou", "in"]
NEW = 12
ABOUT = About("ingot-demo v3", "---\nlicense: pdm\n---\n\n# The card\n", "pdm")


@pytest.fixture(scope="module")
def exported(model_artifact: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder's exported folder."""
    out = tmp_path_factory.mktemp("export") / "model"
    export.write(model_artifact(), out, about=ABOUT)
    return out


def continuations(folder: Path, prompts: list[str]) -> list[list[int]]:
    """Greedy decoding by hand, as training saw texts: the start token first, one row at a time, everything anew."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    encoder = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = []
    for prompt in prompts:
        ids = [0, *encoder.encode(prompt, add_special_tokens=False).ids]
        for _ in range(NEW):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
            if ids[-1] == 1:
                break
        rows.append(ids)
    return rows


def test_a_batch_through_the_pipeline_of_transformers_is_what_each_text_gives_alone(exported: Path) -> None:
    generate = pipeline("text-generation", model=str(exported), batch_size=len(PROMPTS))
    outputs = generate(PROMPTS, max_new_tokens=NEW, do_sample=False, return_tensors=True)
    found = [[i for i in output[0]["generated_token_ids"] if i != 2] for output in outputs]
    expected = continuations(exported, PROMPTS)
    assert len({len(row) for row in expected}) > 1, "rows of one length would need no padding"
    assert found == expected


def test_generation_keeps_a_cache_and_gives_the_text_without_it(exported: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    assert model.config.use_cache
    assert model.generation_config.use_cache
    ids = tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1
    assert output.sequences[0].tolist() == continuations(exported, PROMPTS[1:2])[0]


def test_the_tokenizer_starts_texts_as_training_did_and_knows_how_much_the_model_reads(exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer("the ark").input_ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer("the ark").input_ids[1:] == tokenizer("the ark", add_special_tokens=False).input_ids
    assert tokenizer.decode(tokenizer("the ark").input_ids, skip_special_tokens=True) == "the ark"
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 64)


@pytest.mark.parametrize("special", tokenization.SPECIAL_TOKENS)
def test_a_special_token_spelled_in_a_text_is_the_text_that_packing_saw(special: str, exported: Path) -> None:
    text = f"before{special}after"
    (expected,) = tokenization.encode(Tokenizer.from_file(str(exported / "tokenizer.json")), [text])
    loaded = AutoTokenizer.from_pretrained(exported)
    assert loaded(text)["input_ids"] == loaded([text])["input_ids"][0] == [0, *expected]
    assert not set(expected) & set(range(4))


def test_an_encoder_reads_between_start_and_end_and_pads_on_the_right(
    model_artifact: MakeModel, tmp_path: Path
) -> None:
    export.write(model_artifact(family="encoder"), tmp_path / "out", about=ABOUT)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = tokenizer(["the ark", "in"], padding=True).input_ids
    assert (rows[0][0], rows[0][-1], tokenizer.padding_side) == (0, 1, "right")
    assert "use_cache" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_folder_carries_its_card_and_the_store_keeps_the_bytes_it_had(
    model_artifact: MakeModel, tmp_path: Path
) -> None:
    made = model_artifact()
    export.write(made, tmp_path / "out", about=ABOUT)
    assert (tmp_path / "out" / "README.md").read_text() == ABOUT.card
    made.verify()


def test_a_quantized_variant_says_which_package_reads_it_and_generates_the_same_text_in_a_batch(
    model_artifact: MakeModel, variant: MakeVariant, tmp_path: Path
) -> None:
    made = variant(model_artifact(), tmp_path / "variant", {"method": "rtn", "bits": 8})
    card = model_card.of_artifact({"model:compress.variant": made}, "compress.variant")
    said = export.write(made, tmp_path / "out", about=About("v", card))
    assert "needs: pip install torch transformers compressed-tensors" in said
    assert "`pip install torch transformers compressed-tensors`" in (tmp_path / "out" / "README.md").read_text()
    generate = pipeline("text-generation", model=str(tmp_path / "out"), batch_size=len(PROMPTS))
    outputs = generate(PROMPTS, max_new_tokens=NEW, do_sample=False, return_tensors=True)
    found = [[i for i in output[0]["generated_token_ids"] if i != 2] for output in outputs]
    assert found == continuations(tmp_path / "out", PROMPTS)


def test_torchao_generates_the_text_of_its_own_weights_in_a_batch(model_artifact: MakeModel, tmp_path: Path) -> None:
    said = export.write(model_artifact(), tmp_path / "out", "torchao", "int8", about=ABOUT)
    assert "transformers and torchao" in said
    generate = pipeline("text-generation", model=str(tmp_path / "out"), batch_size=len(PROMPTS))
    outputs = generate(PROMPTS, max_new_tokens=NEW, do_sample=False, return_tensors=True)
    found = [[i for i in output[0]["generated_token_ids"] if i != 2] for output in outputs]
    assert found == continuations(tmp_path / "out", PROMPTS)


def test_llama_cpp_continues_a_text_as_the_folder_does_and_shows_the_models_name(
    model_artifact: MakeModel, llama_cpp: Any, exported: Path, tmp_path: Path
) -> None:
    export.write(model_artifact(), tmp_path / "m.gguf", "gguf", "f32", about=ABOUT)
    reader = llama_cpp(tmp_path / "m.gguf")
    for prompt, expected in zip(PROMPTS, continuations(exported, PROMPTS), strict=True):
        ids = reader.tokens(prompt, add_special=True)
        assert ids[0] == 0
        for _ in range(len(expected) - len(ids)):
            ids.append(int(reader.logits(ids)[-1].argmax()))
        assert ids == expected
    import gguf

    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["general.name"].contents() == "ingot-demo v3"
    assert fields["general.license"].contents() == "pdm"


def test_a_card_without_a_gate_has_licence_data_loading_and_lineage(model_artifact: MakeModel) -> None:
    made = model_artifact()
    card = model_card.of_artifact({"model:pretrain": made}, "pretrain")
    front = yaml.safe_load(card.split("---\n", 2)[1])
    assert front["license"] == "other"
    assert model_card.licence_of(card) == "unknown"
    headings = [line.removeprefix("## ") for line in card.splitlines() if line.startswith("## ")]
    assert headings == ["Data", "Training", "Limits", "Lineage"]
    assert made.digest[:16] in card


def test_a_model_of_others_keeps_its_tokenizer_its_template_and_its_card(tmp_path: Path) -> None:
    config = {"architectures": ["GPT2LMHeadModel"], "n_positions": 64, "use_cache": False}
    theirs = {"eos_token": "</s>", "model_max_length": 64, "padding_side": "right"}
    tokenizer = json.dumps({"added_tokens": [{"content": "</s>", "id": 0}], "post_processor": None})
    texts = {
        "config.json": json.dumps(config),
        "tokenizer_config.json": json.dumps(theirs),
        "tokenizer.json": tokenizer,
    }
    for name, text in (texts | {"chat_template.jinja": "{{ x }}", "README.md": "theirs"}).items():
        (tmp_path / name).write_text(text)
    companions.finish(tmp_path, "ours")
    assert (tmp_path / "tokenizer.json").read_text() == tokenizer
    found = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert found == theirs | {"padding_side": "left", "pad_token": "</s>"}  # a batch can be written on
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ x }}"
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is True
    assert [(tmp_path / name).read_text() for name in ("README.md", "README.original.md")] == ["ours", "theirs"]
