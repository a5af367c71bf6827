"""The gate's truth table: better, worse, within noise, a variant over each budget, not finite, not comparable."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipelines.measure.intervals import paired_ratio
from pipelines.registry.config import PromoteConfig
from pipelines.registry.evidence import Evidence, digest, load, save
from pipelines.registry.gate import choose, decide, table, within_budget

DOCUMENTS = 60
SIZES = np.random.default_rng(0).integers(100, 4000, DOCUMENTS)
DIFFICULTY = np.random.default_rng(1).uniform(0.7, 1.3, DOCUMENTS)
CONFIG = PromoteConfig()


def model(name: str, bits: float, *, base: str | None = None, scatter: float = 0.0, **changes: Any) -> Evidence:
    """Return evidence on a model of these bits per byte; `scatter` is noise of its own on each document."""
    own = np.random.default_rng(len(name)).normal(0.0, scatter, DOCUMENTS)
    nats = bits * math.log(2.0) * SIZES * DIFFICULTY * (1.0 + own)
    value = float(nats.sum() / (SIZES.sum() * math.log(2.0)))
    facts: dict[str, Any] = {
        "name": name,
        "fingerprint": f"print of {name}",
        "digest": f"digest of {name}",
        "base": base,
        "family": "decoder",
        "test_digest": "t" * 64,
        "bits_per_byte": {"value": value, "low": value - 0.02, "high": value + 0.02},
        "tasks": {"cloze": {"accuracy": 0.75, "stderr": 0.05, "n": 64, "chance": 0.25}},
        "size_bytes": 1000 if base is None else 300,
        "nats": nats,
        "sizes": SIZES,
        "settings": {"context": 64, "stride": 48, "documents": "d", "batch_tokens": 512, "max_documents": None},
        "baselines": {"gzip": 3.24, "order1": 3.15} if base is None else {},
        "kl_nats": None if base is None else 0.01,
        "decode_ms": 4.0,
    }
    return Evidence(**(facts | changes))


BASE = model("pretrain", 2.0)
CHAMPION = model("old", 2.05, version="3")


def family(variant: Evidence) -> dict[str, Evidence]:
    """Return a base and its variant by name."""
    return {"pretrain": BASE, variant.name: variant}


def variant_of_base(bits: float = 2.002, **changes: Any) -> Evidence:
    """Return a variant of BASE."""
    return model("variant", bits, base=BASE.fingerprint, **changes)


@pytest.mark.parametrize(
    ("bits", "scatter", "accepted"),
    [
        (2.0, 0.0, True),
        (2.1, 0.0, False),
        (2.05, 0.0, False),
        (2.045, 0.15, False),
        (1.7, 0.15, True),
    ],
    ids=["better", "worse", "equal", "within noise", "better beyond noise"],
)
def test_a_base_must_beat_the_champion_beyond_noise(bits: float, scatter: float, accepted: bool) -> None:
    candidate = model("pretrain", bits, scatter=scatter)
    decision = decide(candidate, {"pretrain": candidate}, CHAMPION, CONFIG)
    assert decision.accepted is accepted
    assert decision.versus_champion is not None
    assert (decision.versus_champion["high"] < 1.0) is accepted
    assert decision.broken == ([] if accepted else ["bits per byte gained on champion v3"])


def test_the_noise_band_is_the_paired_bootstrap_done_by_hand() -> None:
    candidate = model("pretrain", 2.0, scatter=0.1)
    decision = decide(candidate, {"pretrain": candidate}, CHAMPION, CONFIG)
    draws = np.random.default_rng(7).integers(0, DOCUMENTS, (4000, DOCUMENTS))
    ratios = np.array([candidate.nats[d].sum() / CHAMPION.nats[d].sum() for d in draws])
    assert decision.versus_champion is not None
    assert decision.versus_champion["value"] == pytest.approx(candidate.nats.sum() / CHAMPION.nats.sum())
    assert decision.versus_champion["low"] == pytest.approx(np.quantile(ratios, 0.025), abs=3e-3)
    assert decision.versus_champion["high"] == pytest.approx(np.quantile(ratios, 0.975), abs=3e-3)


@pytest.mark.parametrize(
    ("changes", "limits", "broken"),
    [
        ({"bits": 2.1}, {}, "bits per byte / base"),
        ({"size_bytes": 1001}, {}, "bytes / base"),
        ({"tasks": {"cloze": {"accuracy": 0.3, "stderr": 0.05, "n": 64, "chance": 0.25}}}, {}, "accuracy lost, cloze"),
        ({"tasks": {}}, {}, "accuracy lost, cloze"),
        ({"kl_nats": 0.3}, {"max_kl_nats": 0.1}, "KL to base, nats/token"),
        ({"kl_nats": None}, {"max_kl_nats": 0.1}, "KL to base, nats/token"),
        ({"decode_ms": 9.0}, {"max_latency_ratio": 1.5}, "decode time / base"),
        ({"decode_ms": None}, {"max_latency_ratio": 1.5}, "decode time / base"),
        ({"bits": 3.3, "baselines": {}}, {"must_beat": ("gzip",), "max_bits_per_byte_ratio": 2.0}, "beats gzip"),
        ({}, {"must_beat": ("order9",)}, "beats order9"),
        ({"test_digest": "u" * 64}, {}, "bits per byte / base"),
    ],
)
def test_a_variant_over_one_budget_is_refused_and_that_budget_is_named(
    changes: dict[str, Any], limits: dict[str, Any], broken: str
) -> None:
    variant = variant_of_base(**changes)
    decision = decide(variant, family(variant), None, PromoteConfig(**limits))
    assert not decision.accepted
    assert decision.broken == [broken]
    assert any(line.startswith(broken) and line.endswith("BROKEN") for line in table(decision).splitlines())


def test_a_variant_within_all_budgets_is_accepted() -> None:
    variant = variant_of_base()
    limits = PromoteConfig(max_kl_nats=0.1, max_latency_ratio=1.5, must_beat=("gzip", "order1"))
    assert decide(variant, family(variant), None, limits).accepted


def test_a_loss_of_accuracy_within_its_noise_is_no_reason_to_refuse() -> None:
    tasks = {"cloze": {"accuracy": 0.66, "stderr": 0.06, "n": 64, "chance": 0.25}}
    variant = variant_of_base(tasks=tasks)
    assert decide(variant, family(variant), None, CONFIG).accepted


@pytest.mark.parametrize(("informative", "accepted"), [(True, False), (False, True)])
def test_a_task_that_guessing_explains_for_the_base_is_not_weighed(informative: bool, accepted: bool) -> None:
    row = {"accuracy": 0.28, "stderr": 0.02, "n": 64, "chance": 0.25}
    base = replace(BASE, tasks={"cloze": row | {"informative": informative}})
    variant = variant_of_base(tasks={"cloze": row | {"accuracy": 0.1, "informative": True}})
    decision = decide(variant, {"pretrain": base, "variant": variant}, None, CONFIG)
    assert decision.accepted == accepted
    assert ("not weighed: the base has 0.2800, guessing 0.2500" in table(decision)) == accepted


def test_a_variant_that_falls_to_guessing_is_refused() -> None:
    row = {"accuracy": 0.75, "stderr": 0.05, "n": 64, "chance": 0.25, "informative": True}
    base = replace(BASE, tasks={"cloze": row})
    variant = variant_of_base(tasks={"cloze": row | {"accuracy": 0.25, "informative": False}})
    assert decide(variant, {"pretrain": base, "variant": variant}, None, CONFIG).broken == ["accuracy lost, cloze"]


def test_paired_outcomes_show_a_loss_that_standard_errors_hide() -> None:
    right, wrong = [1] * 128, [0] * 20 + [1] * 108
    row = {"accuracy": 1.0, "stderr": 0.08, "n": 128, "chance": 0.25}
    base = replace(BASE, tasks={"cloze": row}, outcomes={"cloze": right})
    worse = variant_of_base(tasks={"cloze": row | {"accuracy": 108 / 128}})
    unpaired = decide(worse, {"pretrain": base, "variant": worse}, None, CONFIG)
    paired_variant = replace(worse, outcomes={"cloze": wrong})
    paired = decide(paired_variant, {"pretrain": base, "variant": paired_variant}, None, CONFIG)
    assert unpaired.accepted
    assert paired.broken == ["accuracy lost, cloze"]


@pytest.mark.parametrize(
    ("champion", "accepted"),
    [
        (replace(BASE, version="1"), True),
        (model("sibling", 1.99, base=BASE.fingerprint, version="1", size_bytes=600), True),
        (model("sibling", 1.99, base=BASE.fingerprint, version="1"), False),
        (model("sibling", 1.99, base=BASE.fingerprint, version="1", size_bytes=150), False),
        (model("stranger", 1.99, version="1"), False),
        (model("stranger", 2.1, version="1"), True),
        (None, True),
    ],
    ids=[
        "its base",
        "a larger sibling",
        "a better sibling of its size",
        "a better and smaller sibling",
        "a better stranger",
        "a worse stranger",
        "nobody",
    ],
)
def test_a_variant_may_replace_its_family_and_must_beat_strangers(champion: Evidence | None, accepted: bool) -> None:
    variant = variant_of_base()
    assert decide(variant, family(variant), champion, CONFIG).accepted is accepted


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_before_any_comparison(poison: float) -> None:
    nats = BASE.nats.copy()
    nats[3] = poison
    candidate = replace(BASE, nats=nats)
    decision = decide(candidate, {"pretrain": candidate}, CHAMPION, CONFIG)
    assert decision.broken == ["finite numbers"]
    assert decision.versus_champion is None


@pytest.mark.parametrize("bits", [math.nan, 0.0, -1.0, 8.0, 50.0])
def test_bits_per_byte_that_no_model_has_are_refused(bits: float) -> None:
    candidate = replace(BASE, bits_per_byte={"value": bits, "low": 1.0, "high": 2.0})
    assert "bits per byte" in decide(candidate, {"pretrain": candidate}, None, CONFIG).broken


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"test_digest": "u" * 64}, "held-out text differs"),
        ({"family": "encoder"}, "count different bits"),
        ({"sizes": SIZES[:-1], "nats": BASE.nats[:-1]}, "different documents"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason_unless_allowed(
    changes: dict[str, Any], reason: str
) -> None:
    candidate = replace(BASE, **changes)
    decision = decide(candidate, {"pretrain": candidate}, CHAMPION, CONFIG)
    assert not decision.accepted
    assert reason in decision.rule
    assert "promote.allow_new_test_set=true" in table(decision)
    assert decide(candidate, {"pretrain": candidate}, CHAMPION, PromoteConfig(allow_new_test_set=True)).accepted


def test_the_champion_itself_passes_again() -> None:
    again = replace(CHAMPION, version=None)
    assert decide(again, {"old": again, "pretrain": BASE}, CHAMPION, CONFIG).rule == "is the champion already"


def test_problems_with_the_evaluation_are_refused_by_their_words() -> None:
    candidate = replace(BASE, problems=("the evaluation is of another model",))
    decision = decide(candidate, {"pretrain": candidate}, None, CONFIG)
    assert "the evaluation is of another model" in table(decision)
    assert not decision.accepted


def test_smallest_takes_the_smallest_variant_within_budget_and_says_whom_it_passed_over() -> None:
    good = variant_of_base()
    small = replace(variant_of_base(2.3), name="tiny", fingerprint="print of tiny", size_bytes=50)
    models = {"pretrain": BASE, "tiny": small, "variant": good}
    chosen, passed_over = choose(models, CONFIG)
    assert chosen is good
    assert passed_over == ["tiny (50 bytes): bits per byte / base"]
    assert within_budget(models, CONFIG) == [good]


def test_among_children_of_the_same_bits_the_better_one_is_taken() -> None:
    better = replace(variant_of_base(2.001), name="better", fingerprint="print of better", size_bytes=300_100)
    shorter = replace(variant_of_base(2.004), name="shorter", fingerprint="print of shorter", size_bytes=300_000)
    config = PromoteConfig(max_bytes_ratio=10.0)
    base = replace(BASE, size_bytes=1_000_000)
    assert choose({"pretrain": base, "better": better, "shorter": shorter}, config)[0] is better


def test_smallest_falls_back_to_the_base() -> None:
    bad = variant_of_base(2.5)
    chosen, passed_over = choose(family(bad), CONFIG)
    assert chosen is BASE
    assert len(passed_over) == 1
    assert choose({"pretrain": BASE}, CONFIG) == (BASE, [])


def test_a_named_candidate_is_taken_whatever_it_measures() -> None:
    bad = variant_of_base(2.5)
    assert choose(family(bad), PromoteConfig(candidate="variant"))[0] is bad


def test_evidence_survives_the_registry(tmp_path: Any) -> None:
    variant = variant_of_base(outcomes={"cloze": [1, 0, 1]})
    save(variant, tmp_path)
    again = load(tmp_path, "7", digest(variant))
    assert again.facts() == variant.facts()
    assert again.version == "7"
    assert np.array_equal(again.nats, variant.nats)
    assert decide(replace(again, version=None), family(variant), again, CONFIG).rule == "is the champion already"


def test_a_variant_that_saves_cache_alone_passes_when_the_cache_counts() -> None:
    base = replace(BASE, cache_bytes=100.0)
    variant = variant_of_base(size_bytes=1010, cache_bytes=20.0)
    models = {"pretrain": base, "variant": variant}
    on_disk = decide(variant, models, None, CONFIG)
    assert on_disk.broken == ["bytes / base"]
    served = PromoteConfig(cache_tokens=100, max_bytes_ratio=0.3)
    decision = decide(variant, models, None, served)
    assert decision.accepted
    check = next(check for check in decision.checks if check.name == "bytes / base")
    assert check.found == f"{(1010 + 2000) / (1000 + 10_000):.3f}"
    assert check.required == "at most 0.3 (with the cache of 100 tokens)"


def test_the_smallest_variant_is_that_which_needs_the_fewest_bytes_in_service() -> None:
    base = replace(BASE, cache_bytes=100.0)
    light = variant_of_base(size_bytes=300, cache_bytes=100.0)
    cached = replace(variant_of_base(size_bytes=400, cache_bytes=10.0), name="cached", fingerprint="print of cached")
    models = {"pretrain": base, "variant": light, "cached": cached}
    assert choose(models, CONFIG)[0] is light
    assert choose(models, PromoteConfig(cache_tokens=10))[0] is cached


def test_models_without_a_cache_count_their_bytes_on_disk() -> None:
    variant = variant_of_base()
    assert decide(variant, family(variant), None, PromoteConfig(cache_tokens=10_000)).accepted


def spaces(noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Two descriptions of 40 documents by 10 anchors, `noise` apart."""
    generator = np.random.default_rng(0)
    one = generator.uniform(-1, 1, (40, 10))
    return one, one + noise * generator.uniform(-1, 1, (40, 10))


@pytest.mark.parametrize(("noise", "accepted"), [(0.02, True), (0.5, False)])
def test_an_embedding_space_too_far_from_the_champions_is_refused_when_there_is_a_limit(
    noise: float, accepted: bool
) -> None:
    mine, theirs = spaces(noise)
    better = model("better", 1.8, family="encoder", relative=mine)
    champion = model("old", 2.05, version="3", family="encoder", relative=theirs)
    free = decide(better, {"pretrain": better}, champion, CONFIG)
    assert free.accepted
    assert free.relative is not None
    assert free.relative["distance"]["value"] == pytest.approx(float(np.abs(mine - theirs).mean()))
    bound = decide(better, {"pretrain": better}, champion, PromoteConfig(max_relative_distance=0.1))
    assert bound.accepted is accepted
    assert bound.broken == ([] if accepted else ["embedding distance to champion v3"])
    assert f"chance {free.relative['baseline_distance']:.4f}" in table(bound)


def test_a_limit_on_the_embedding_space_needs_a_measurement() -> None:
    mine, _ = spaces(0.0)
    config = PromoteConfig(max_relative_distance=0.1, allow_new_test_set=True)
    for champion in (CHAMPION, replace(CHAMPION, relative=mine[:-1]), replace(CHAMPION, test_digest="u" * 64)):
        better = model("better", 1.8, relative=mine)
        decision = decide(better, {"pretrain": better}, champion, config)
        assert decision.broken == ["embedding distance to champion v3"]
        assert "not measured" in table(decision)
    assert decide(better, {"pretrain": better}, None, config).accepted


def test_the_description_of_a_space_survives_the_registry(tmp_path: Any) -> None:
    mine, _ = spaces(0.0)
    save(replace(BASE, relative=mine), tmp_path)
    again = load(tmp_path, "7", digest(replace(BASE, relative=mine)))
    assert again.relative is not None
    assert np.array_equal(again.relative, mine)
    save(BASE, tmp_path / "plain")
    assert load(tmp_path / "plain", "7", digest(BASE)).relative is None


def even(name: str, bits: float, **changes: Any) -> Evidence:
    """Return evidence on a model that needs as many bits for every byte: its gains have no noise."""
    return model(name, bits, nats=bits * math.log(2.0) * SIZES, **changes)


def test_a_variant_whose_loss_may_be_beyond_its_budget_is_refused_though_its_mean_is_within() -> None:
    variant = variant_of_base(2.03, scatter=0.05)
    ratio = paired_ratio(variant.nats, BASE.nats, SIZES)
    assert ratio.value < CONFIG.max_bits_per_byte_ratio < ratio.high
    assert decide(variant, family(variant), None, CONFIG).broken == ["bits per byte / base"]


def test_what_is_exactly_at_a_limit_is_within_it() -> None:
    variant = variant_of_base(size_bytes=BASE.size_bytes, kl_nats=0.1, decode_ms=6.0)
    config = PromoteConfig(max_bytes_ratio=1.0, max_kl_nats=0.1, max_latency_ratio=1.5, min_documents=DOCUMENTS)
    assert decide(variant, family(variant), None, config).accepted
    more = config.model_copy(update={"min_documents": DOCUMENTS + 1})
    assert decide(variant, family(variant), None, more).broken == ["held-out documents"]


def test_what_only_equals_is_no_gain_and_beats_no_baseline() -> None:
    same, champion = even("same", 2.05), even("old", 2.05, version="3")
    refused = decide(same, {"pretrain": same}, champion, PromoteConfig(min_effect=0.0))
    assert refused.gain == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert refused.broken == ["bits per byte gained on champion v3"]
    level = replace(same, baselines={"gzip": same.bits_per_byte["value"]})
    assert decide(level, {"pretrain": level}, None, PromoteConfig(must_beat=("gzip",))).broken == ["beats gzip"]


@pytest.mark.parametrize(
    ("size", "gained", "accepted"),
    [
        (1000, 0.0015, False),
        (1000, 0.0025, True),
        (1000, -0.0015, False),
        (4000, 0.021, False),  # two doublings: 0.002 + 2 x 0.01
        (4000, 0.023, True),
        (900, -0.0015, True),
        (900, -0.0025, False),
    ],
)
def test_what_must_be_gained_follows_from_the_bytes(size: int, gained: float, *, accepted: bool) -> None:
    champion = even("old", 2.05, version="3")
    candidate = even("new", 2.05 - gained, size_bytes=size)
    assert decide(candidate, {"pretrain": candidate}, champion, CONFIG).accepted is accepted


def test_the_champion_rebuilt_with_other_bytes_is_judged_anew() -> None:
    rebuilt = replace(CHAMPION, version=None, digest="other bytes")
    decision = decide(rebuilt, {"pretrain": rebuilt}, CHAMPION, CONFIG)
    assert decision.broken == ["bits per byte gained on champion v3"]


def test_a_variant_larger_than_the_chosen_one_is_not_spoken_of() -> None:
    good = variant_of_base()
    large = replace(variant_of_base(2.5), name="large", fingerprint="print of large", size_bytes=900)
    assert choose({"pretrain": BASE, "large": large, "variant": good}, CONFIG) == (good, [])


def test_models_are_compared_on_the_same_documents_and_settings_only() -> None:
    others = replace(BASE, sizes=SIZES + 1)
    assert "measured on different documents: 60 and 60" in decide(others, {"pretrain": others}, CHAMPION, CONFIG).rule
    wider = replace(BASE, settings=BASE.settings | {"context": 128})
    decision = decide(wider, {"pretrain": wider}, CHAMPION, CONFIG)
    assert "measured at different settings: context 128 and 64" in decision.rule
    assert not decision.accepted
    batches = replace(BASE, settings=BASE.settings | {"batch_tokens": 9999})
    assert decide(batches, {"pretrain": batches}, CHAMPION, CONFIG).accepted


def test_an_embedding_space_that_may_be_too_far_is_refused_though_its_mean_is_near() -> None:
    mine, theirs = spaces(0.1)
    better = model("better", 1.8, family="encoder", relative=mine)
    champion = model("old", 2.05, version="3", family="encoder", relative=theirs)
    free = decide(better, {"pretrain": better}, champion, CONFIG)
    assert free.relative is not None
    distance = free.relative["distance"]
    limit = (distance["value"] + distance["high"]) / 2
    bound = decide(better, {"pretrain": better}, champion, PromoteConfig(max_relative_distance=limit))
    assert bound.broken == ["embedding distance to champion v3"]
