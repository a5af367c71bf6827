"""The model card: front matter that tools read, tables that people read, all from the records."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from pipelines.registry import evidence, gate, model_card
from pipelines.registry.config import PromoteConfig


def rendered(inputs: Any, name: str = "pretrain") -> tuple[dict[str, Any], str]:
    """Return the front matter and the page of a card."""
    models = evidence.read(inputs)
    config = PromoteConfig(candidate=name)
    decision = gate.decide(models[name], models, None, config)
    _, front, page = model_card.render(models[name], models, inputs, decision, config).split("---\n", 2)
    return yaml.safe_load(front), page


def test_a_pretrained_model_names_no_base_model(world: Any) -> None:
    front, page = rendered(world.candidate(2.0))
    assert "base_model" not in front
    assert front["pipeline_tag"] == "text-generation"
    assert front["library_name"] == "transformers"
    assert "pretrained from scratch" in page


def test_a_variant_names_its_base_its_method_and_its_bits(world: Any) -> None:
    base = world.model("pretrain")
    variant = world.model("int8", base=base)
    pairs = [(base, world.evaluation(base, 2.0)), (variant, world.evaluation(variant, 2.002, size=300))]
    front, page = rendered(world.inputs(*pairs), "int8")
    assert front["base_model"] == f"ingot/pretrain-{base.manifest.fingerprint[:16]}"
    assert "compressed with rtn to 8.5 bits per weight" in page
    assert "with all its other tensors 11.1 bits for each weight of its base model" in page
    unjudged = model_card.of_artifact({"model:pretrain": base, "model:int8": variant}, "int8")
    assert "with all its other tensors 11.1 bits for each weight of its base model" in unjudged
    assert "| int8 |" in page
    assert "| pretrain |" in page


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("kv_cache.safetensors", "ignores that file: it keeps an ordinary cache"),
        ("packed.safetensors", "a layout that no public loader reads"),
    ],
)
def test_a_variant_that_plain_transformers_does_not_compute_is_told_to_be_loaded_with_ours(
    file: str, said: str, world: Any
) -> None:
    base = world.model("pretrain")
    variant = world.model("coded", base=base, files={file: b"tables"})
    pairs = [
        (base, world.evaluation(base, 2.0, extra={"cache_bytes_per_token": 4096.0})),
        (variant, world.evaluation(variant, 2.002, extra={"cache_bytes_per_token": 512.5})),
    ]
    _, page = rendered(world.inputs(*pairs), "coded")
    assert said in page
    assert "from pipelines.modelio.load import load_model" in page
    assert "no code of Ingot is needed" not in page
    assert ("model.new_cache()" in page) == (file == "kv_cache.safetensors")
    assert "| 512.5 |" in page
    assert "| 4,096.0 |" in page
    _, page = rendered(world.inputs(*pairs))
    assert "no code of Ingot is needed" in page


def test_baselines_and_tasks_stand_beside_the_model(world: Any) -> None:
    _, page = rendered(world.candidate(2.0))
    assert "| gzip (baseline) | 3.2400 |" in page
    assert "| cloze | 0.75 |" in page


def test_an_encoder_is_presented_as_one(world: Any) -> None:
    front, page = rendered(world.candidate(2.0, family="encoder"))
    assert front["pipeline_tag"] == "fill-mask"
    assert "AutoModelForMaskedLM" in page
    assert "A masked language model" in page


def test_a_truncated_evaluation_is_marked_twice(world: Any) -> None:
    _, page = rendered(world.candidate(2.0, extra={"truncated": True}))
    assert page.count("runcated") >= 2


def test_a_refusal_is_told_with_the_broken_check(world: Any) -> None:
    _, page = rendered(world.candidate(9.0))
    assert "refused (own measurements)" in page
    assert "**broken**" in page


@pytest.mark.parametrize(
    ("licences", "name", "details"),
    [
        (["Public-Domain"], "pdm", None),
        (["CC-BY-2.5"], "cc-by-2.5", None),
        (["PSF-2.0"], "other", "PSF-2.0"),
        (["CC-BY-2.5", "PSF-2.0"], "other", "CC-BY-2.5, PSF-2.0"),
    ],
)
def test_the_licence_is_the_corpus_licence_or_spelt_out(
    world: Any, licences: list[str], name: str, details: str | None
) -> None:
    inputs = world.candidate(2.0)
    path = inputs["prepare"].path / "report.json"
    path.write_text(json.dumps({"sources": {"shakespeare": {"read": 50, "kept": 45, "licenses": licences}}}))
    front, page = rendered(inputs)
    assert front["license"] == name
    assert front.get("license_details") == details
    assert f"| shakespeare | {', '.join(licences)} |" in page


def test_no_card_opens_the_documents_of_the_corpus(world: Any, opened_files: list[str]) -> None:
    """A card that streamed the training split would read the whole corpus once for each registered model."""
    base = world.model("pretrain")
    variant = world.model("int8", base=base)
    pairs = [(base, world.evaluation(base, 2.0)), (variant, world.evaluation(variant, 2.002, size=300))]
    inputs = world.inputs(*pairs)
    opened_files.clear()
    world.promote(inputs, register_variants=True)
    reports = [name for name in opened_files if name.endswith("prepare/1/report.json")]
    assert 1 <= len(reports) <= 4
    assert not [name for name in opened_files if "/documents/" in name]


def test_the_card_hides_what_the_environment_keeps_secret(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = world.candidate(2.0)
    monkeypatch.setenv("CORPUS_PASSWORD", "shakespeare")
    front, page = rendered(inputs)
    assert front["datasets"] == ["***"]
    assert "shakespeare" not in page


def test_what_a_corpus_says_is_shown_as_text_and_never_obeyed(world: Any) -> None:
    inputs = world.candidate(2.0)
    names = ["<script>alert(1)</script>", "[go](javascript:alert(1)) | x\n# a heading"]
    sources = {name: {"read": 5, "kept": 4, "licenses": ["<img src=x onerror=alert(1)>"]} for name in names}
    (inputs["prepare"].path / "report.json").write_text(json.dumps({"sources": sources}))
    world.promote(inputs)
    versions = world.client().search_model_versions("name = 'ingot'")
    front, page = rendered(inputs)
    for text in (page, yaml.safe_dump(front), versions[0].description):
        assert "<script" not in text
        assert "<img" not in text
    assert "](javascript" not in page
    assert "\n# a heading" not in page
    assert "| &lt;script&gt;alert(1)&lt;/script&gt; |" in page


def test_what_a_model_writes_is_shown_as_text_and_never_obeyed(world: Any) -> None:
    evil = "<script>alert(1)</script> | ](javascript:alert(1))\n\n# a heading\n```\n<b>"
    model = world.model("pretrain")
    guesses = [[{"text": " <i>", "probability": 0.75}, {"text": " word", "probability": 0.125}]]
    samples = [{"prompt": "<img src=x>", "text": evil}, {"prompt": "a [MASK]", "masks": guesses}]
    inputs = world.inputs((model, world.evaluation(model, 2.0, samples=samples)))
    world.promote(inputs)
    _, page = rendered(inputs)
    for text in (page, world.client().search_model_versions("name = 'ingot'")[0].description):
        assert "## What it writes" in text
        assert "&lt;script&gt;alert(1)&lt;/script&gt; \\| ]\\(javascript:alert(1))" in text
        assert "| a [MASK] | &lt;i&gt; 0.750, word 0.125 |" in text
        for inert in ("<script", "<img", "<b>", "<i>", "](javascript", "\n# a heading", "\n```\n<"):
            assert inert not in text
    assert "What it writes" not in rendered(world.candidate(2.0))[1]


def test_mlflow_shows_the_page_without_the_front_matter(world: Any) -> None:
    world.promote(world.candidate(2.0))
    description = world.client().search_model_versions("name = 'ingot'")[0].description
    assert description.startswith("# ingot: pretrain\n")
    assert "model-index" not in description
