"""The gate: pure functions from evidence to a decision, with every number that it rests on.

A model passes when its numbers are sane and it beats the champion: it must gain bits per byte beyond the noise of the
choice of documents and beyond the minimum effect, more if it is larger. A model of fewer bytes may lose as much as the
minimum effect. A compressed variant must stay within its budget against its own base; it may then replace that base, or
another variant of it, if it is the smaller one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from pipelines.core.stage import base_name
from pipelines.evaluation.probes import relative
from pipelines.measure.intervals import Interval, paired_difference, paired_gain, paired_ratio
from pipelines.registry.config import PromoteConfig
from pipelines.registry.evidence import Evidence, footprint

UNIFORM_BITS_PER_BYTE = 8.0
"""What guessing every byte with equal probability costs: a model above it knows less than nothing."""

_SAME_SIZE = 1.001
"""Models whose sizes differ by less hold the same bits, packed beside a longer or shorter description."""


@dataclass(frozen=True)
class Check:
    """One condition of the gate, as the user reads it."""

    name: str
    found: str
    required: str
    passed: bool


@dataclass(frozen=True)
class Decision:
    """The outcome of the gate for one candidate."""

    accepted: bool
    candidate: str
    rule: str
    """Which rule decided, in words."""
    checks: tuple[Check, ...]
    versus_champion: Mapping[str, float] | None = None
    """Candidate's bits per byte over the champion's: value, low, high."""
    gain: Mapping[str, float] | None = None
    """Bits per byte that the candidate saves over the champion: value, low, high."""
    relative: Mapping[str, Any] | None = None
    """How far the candidate's embedding space is from the champion's; see `pipelines.evaluation.probes.relative`."""

    @property
    def broken(self) -> list[str]:
        """Names of the conditions that do not hold."""
        return [check.name for check in self.checks if not check.passed]

    def to_json(self) -> dict[str, Any]:
        """Return the decision as JSON values."""
        return asdict(self) | {"broken": self.broken}


def choose(models: Mapping[str, Evidence], config: PromoteConfig) -> tuple[Evidence, list[str]]:
    """Return the candidate, and a line for each smaller variant that was passed over.

    Args:
        models: name -> evidence, the base among them.
        config: `candidate` names the rule or the model.
    """
    if config.candidate != "smallest":
        return models[config.candidate], []
    passed_over: list[str] = []
    within: list[Evidence] = []
    size = functools.partial(footprint, cache_tokens=config.cache_tokens)
    for variant in sorted((m for m in models.values() if m.base is not None), key=size):
        broken = [check.name for check in _own_checks(variant, _base_of(variant, models), config) if not check.passed]
        if not broken:
            within.append(variant)
        elif not within:
            passed_over.append(f"{variant.name} ({size(variant):.0f} bytes): {', '.join(broken)}")
    if not within:
        return models[base_name(models)], passed_over
    as_small = [variant for variant in within if size(variant) <= _SAME_SIZE * size(within[0])]
    return min(as_small, key=lambda variant: variant.bits_per_byte["value"]), passed_over


def within_budget(models: Mapping[str, Evidence], config: PromoteConfig) -> list[Evidence]:
    """Return the variants that pass every check against their own base."""
    return [
        variant
        for variant in models.values()
        if variant.base is not None and all(c.passed for c in _own_checks(variant, _base_of(variant, models), config))
    ]


def decide(
    candidate: Evidence,
    models: Mapping[str, Evidence],
    champion: Evidence | None,
    config: PromoteConfig,
    *,
    obstacle: str = "",
) -> Decision:
    """Decide whether the candidate may become champion.

    Args:
        candidate: who is put forward.
        models: every model of the run, among them the candidate's base.
        champion: who holds the title; None when nobody does, or when there are no numbers of it.
        config: budgets and confidence.
        obstacle: why there are no numbers of a champion that there is; empty otherwise.
    """
    base = _base_of(candidate, models) if candidate.base is not None else None
    checks = _own_checks(candidate, base, config)
    if not all(check.passed for check in checks):
        return Decision(accepted=False, candidate=candidate.name, rule="own measurements", checks=tuple(checks))
    if obstacle:
        return _without_comparison(candidate, champion, obstacle, checks, config)
    if champion is None:
        return _accept(candidate, "first champion: nobody to beat", checks)
    if (champion.fingerprint, champion.digest) == (candidate.fingerprint, candidate.digest):
        return _accept(candidate, "is the champion already", checks)
    if difference := incomparable(candidate, champion):
        return _without_comparison(candidate, champion, difference, checks, config)
    if champion.measured_again:
        name, why = f"champion v{champion.version} was measured", champion.measured_again
        checks = [*checks, Check(name, "again", why, passed=True)]
    moved = _moved(candidate, champion, config.confidence)
    if config.max_relative_distance is not None:
        checks = [*checks, _compatible(moved, champion, config.max_relative_distance)]
    return _against_champion(candidate, champion, checks, moved, config)


def table(decision: Decision) -> str:
    """Return the checks as a plain-text table, broken ones marked."""
    rows = [("check", "found", "required", "")]
    rows += [(c.name, c.found, c.required, "ok" if c.passed else "BROKEN") for c in decision.checks]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _own_checks(model: Evidence, base: Evidence | None, config: PromoteConfig) -> list[Check]:
    """Return the checks that need no champion; a model whose numbers are not sane is compared with nothing."""
    checks = _sanity(model, config)
    if all(check.passed for check in checks):
        checks += _baselines(model, base, config)
        if base is not None:
            checks += _budget(model, base, config)
    return checks


def _sanity(model: Evidence, config: PromoteConfig) -> list[Check]:
    documents = len(model.nats)
    bits = model.bits_per_byte["value"]
    numbers = [*model.bits_per_byte.values(), *(t["accuracy"] for t in model.tasks.values()), *model.nats.tolist()]
    return [
        *(Check("measurements", problem, "of this model", passed=False) for problem in model.problems),
        Check(
            "held-out documents",
            str(documents),
            f"at least {config.min_documents} (promote.min_documents)",
            documents >= config.min_documents,
        ),
        Check(
            "finite numbers", str(sum(not _finite(n) for n in numbers)) + " not finite", "none", _all_finite(numbers)
        ),
        Check("bits per byte", f"{bits:.4f}", "above 0, below 8", _finite(bits) and 0.0 < bits < UNIFORM_BITS_PER_BYTE),
    ]


def _baselines(model: Evidence, base: Evidence | None, config: PromoteConfig) -> Iterable[Check]:
    """Compare with compressors and count models; a variant's are those measured beside its base."""
    baselines = {**(base.baselines if base else {}), **model.baselines}
    bits = model.bits_per_byte["value"]
    for name in config.must_beat:
        if name not in baselines:
            yield Check(f"beats {name}", f"{bits:.4f}", "not measured; see evaluate.baselines", passed=False)
        else:
            yield Check(f"beats {name}", f"{bits:.4f}", f"below {baselines[name]:.4f}", bits < baselines[name])


def _budget(variant: Evidence, base: Evidence, config: PromoteConfig) -> Iterable[Check]:
    """Compare a variant with its own base."""
    yield _quality(variant, base, config)
    for task in base.tasks:
        yield _task(task, variant, base, config)
    size = footprint(variant, config.cache_tokens) / footprint(base, config.cache_tokens)
    counted = f" (with the cache of {config.cache_tokens} tokens)" if config.cache_tokens else ""
    allowed = f"at most {config.max_bytes_ratio:g}{counted}"
    yield Check("bytes / base", f"{size:.3f}", allowed, size <= config.max_bytes_ratio)
    if config.max_kl_nats is not None:
        yield _limit("KL to base, nats/token", variant.kl_nats, config.max_kl_nats)
    if config.max_latency_ratio is not None:
        timed = variant.decode_ms is not None and base.decode_ms is not None and base.decode_ms > 0
        ratio = variant.decode_ms / base.decode_ms if timed and variant.decode_ms and base.decode_ms else None
        yield _limit("decode time / base", ratio, config.max_latency_ratio)


def _quality(variant: Evidence, base: Evidence, config: PromoteConfig) -> Check:
    name, required = "bits per byte / base", f"upper end at most {config.max_bits_per_byte_ratio:g}"
    if difference := incomparable(variant, base):
        return Check(name, difference, required, passed=False)
    ratio = paired_ratio(variant.nats, base.nats, variant.sizes, confidence=config.confidence)
    return Check(name, str(ratio), required, ratio.high <= config.max_bits_per_byte_ratio)


def _task(task: str, variant: Evidence, base: Evidence, config: PromoteConfig) -> Check:
    """Compare an accuracy with the base's: only a loss beyond budget and beyond the noise of the items counts.

    Where guessing explains what the base got right there is nothing to lose, and a difference says nothing.
    """
    name, required = f"accuracy lost, {task}", f"lower end at most {config.max_task_accuracy_drop:g}"
    row = base.tasks[task]
    if not row.get("informative", True):  # evaluations of older versions do not say
        found = f"not weighed: the base has {row['accuracy']:.4f}, guessing {row['chance']:.4f}"
        return Check(name, found, "any: guessing explains the base's", passed=True)
    if task not in variant.tasks:
        return Check(name, "not measured", required, passed=False)
    lost = _accuracy_lost(task, variant, base, config.confidence)
    return Check(name, str(lost), required, lost.low <= config.max_task_accuracy_drop)


def _accuracy_lost(task: str, variant: Evidence, base: Evidence, confidence: float) -> Interval:
    """Return base's minus variant's accuracy: paired by item where outcomes are known, else from standard errors."""
    before, after = base.outcomes.get(task, ()), variant.outcomes.get(task, ())
    if len(before) == len(after) > 1:
        return paired_difference(before, after, confidence=confidence)
    lost = base.tasks[task]["accuracy"] - variant.tasks[task]["accuracy"]
    errors = (base.tasks[task]["stderr"], variant.tasks[task]["stderr"])
    noise = NormalDist().inv_cdf(0.5 + confidence / 2) * math.hypot(*errors)
    return Interval(lost, lost - noise, lost + noise)


def _limit(name: str, value: float | None, limit: float) -> Check:
    if value is None:
        return Check(name, "not measured", f"at most {limit:g}", passed=False)
    return Check(name, f"{value:.4f}", f"at most {limit:g}", _finite(value) and value <= limit)


def incomparable(one: Evidence, other: Evidence) -> str | None:
    """Say why two models' numbers must not be compared, or None when they may."""
    if one.family != other.family:
        return f"a {one.family} and a {other.family} count different bits"
    if one.test_digest != other.test_digest:
        return f"held-out text differs: {one.test_digest[:12]} and {other.test_digest[:12]}"
    if difference := _settings_differ(one.settings, other.settings):
        return difference
    if not np.array_equal(one.sizes, other.sizes):
        return f"measured on different documents: {len(one.sizes)} and {len(other.sizes)} of them"
    return None


def _settings_differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Name the first evaluation setting in which two models differ; the batch changes nothing but rounding."""
    for name in sorted((one.keys() | other.keys()) - {"batch_tokens", "max_documents"}):
        if one.get(name) != other.get(name):
            values = " and ".join(str(each.get(name, "unknown"))[:12] for each in (one, other))
            return f"measured at different settings: {name} {values}"
    return None


def _without_comparison(
    candidate: Evidence, champion: Evidence | None, difference: str, checks: list[Check], config: PromoteConfig
) -> Decision:
    required = "the same text and settings (promote.allow_new_test_set=true goes on without)"
    checks = [*checks, Check("comparable with champion", difference, required, config.allow_new_test_set)]
    if config.max_relative_distance is not None:
        checks.append(_compatible(None, champion, config.max_relative_distance))
    rule = f"no comparison with the champion: {difference}"
    return Decision(all(check.passed for check in checks), candidate.name, rule, tuple(checks))


def _moved(candidate: Evidence, champion: Evidence, confidence: float) -> dict[str, Any] | None:
    """Return how far the candidate's embedding space is from the champion's, where both were described."""
    one, other = candidate.relative, champion.relative
    if one is None or other is None or one.shape != other.shape:
        return None
    return relative.compare(one, other, confidence=confidence)


def _compatible(moved: Mapping[str, Any] | None, champion: Evidence | None, limit: float) -> Check:
    number = f" v{champion.version}" if champion is not None else ""
    name, required = f"embedding distance to champion{number}", f"upper end at most {limit:g}"
    if moved is None:
        return Check(
            name, f"not measured: only for encoders, on {relative.FEWEST} documents or more", required, passed=False
        )
    distance = Interval(**moved["distance"])
    found = f"{distance} (chance {moved['baseline_distance']:.4f})"
    return Check(name, found, required, distance.high <= limit)


def _against_champion(
    candidate: Evidence,
    champion: Evidence,
    checks: list[Check],
    moved: Mapping[str, Any] | None,
    config: PromoteConfig,
) -> Decision:
    """Weigh the bits per byte that the candidate gains against the bytes that it takes."""
    numbers = (candidate.nats, champion.nats, candidate.sizes)
    gain = paired_gain(*numbers, confidence=config.confidence)
    bytes_ratio = footprint(candidate, config.cache_tokens) / footprint(champion, config.cache_tokens)
    smaller = bytes_ratio * _SAME_SIZE < 1.0
    related = smaller and candidate.base is not None and candidate.base in {champion.fingerprint, champion.base}
    least, required = _least(bytes_ratio, config)
    if gain.low > 0.0 and gain.low >= least:
        passed, rule = True, "beats the champion beyond noise and the minimum effect"
    elif smaller and gain.low >= -config.min_effect:
        passed, rule = True, "smaller than the champion, and no worse beyond the minimum effect"
        required = f"smaller: lower end at least {-config.min_effect:g}"
    elif related:
        passed, rule = True, "smaller variant within budget of the champion's own model"
        required = "any: smaller, and within budget of the champion's model"
    else:
        passed, rule = False, "must beat the champion beyond noise and the minimum effect"
        required = f"smaller: lower end at least {-config.min_effect:g}" if smaller else required
    number = f"champion v{champion.version}"
    size = Check(f"bytes / {number}", f"{bytes_ratio:.3f}", "any; it sets what must be gained", passed=True)
    quality = Check(f"bits per byte gained on {number}", str(gain), required, passed)
    checks = [*checks, size, quality]
    ratio = paired_ratio(*numbers, confidence=config.confidence)
    accepted = all(check.passed for check in checks)
    return Decision(accepted, candidate.name, rule, tuple(checks), ratio.to_json(), gain.to_json(), moved)


def _least(bytes_ratio: float, config: PromoteConfig) -> tuple[float, str]:
    """Return the bits per byte that a candidate of so many times the champion's bytes must gain, and say why."""
    doublings = math.log2(bytes_ratio) if bytes_ratio > _SAME_SIZE else 0.0
    least = config.min_effect + config.min_gain_per_doubling * doublings
    parts = f": {config.min_effect:g} + {config.min_gain_per_doubling:g} x {doublings:.2f} doublings of bytes"
    return least, f"lower end above 0 and at least {least:.4f}{parts if doublings else ''}"


def _accept(candidate: Evidence, rule: str, checks: list[Check]) -> Decision:
    return Decision(accepted=True, candidate=candidate.name, rule=rule, checks=tuple(checks))


def _base_of(variant: Evidence, models: Mapping[str, Evidence]) -> Evidence:
    return next((m for m in models.values() if m.fingerprint == variant.base), models[base_name(models)])


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _all_finite(values: list[float]) -> bool:
    return all(_finite(value) for value in values)
