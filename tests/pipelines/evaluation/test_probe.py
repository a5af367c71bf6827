"""The registry of probes: a new file is a new probe, in the configuration, in the stage and in its artifacts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.core.artifact import Artifact
from pipelines.core.stage import StageContext
from pipelines.evaluation import probe, probes, stage
from pipelines.evaluation.config import EvaluateConfig

ONE_FILE = '''
"""How long documents are in tokens: a probe in a file of its own."""

from pydantic import Field

from pipelines.evaluation.probe import Measurement, Probe, ProbeSettings, Subject


class LengthSettings(ProbeSettings):
    """What counts."""

    longest: int = Field(default=10, ge=1, description="Tokens of a document that count.")


class Lengths(Probe[LengthSettings]):
    """Mean length of the held-out documents."""

    families = frozenset({"decoder"})
    Settings = LengthSettings

    def _measure(self, subject: Subject, settings: LengthSettings) -> Measurement:
        lengths = [min(len(ids), settings.longest) for ids in subject.documents.tokens]
        versus = {"seen": True} if subject.base else {}
        return Measurement(result={"mean": sum(lengths) / len(lengths)}, versus_base=versus, observation={"s": 0.5})
'''


@pytest.fixture
def add_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Return a function that adds a file to the package of probes; it is gone after the test."""
    folder = tmp_path / "probes"
    folder.mkdir()
    monkeypatch.setattr(probes, "__path__", [*probes.__path__, str(folder)])
    added: list[str] = []

    def add(name: str, text: str) -> None:
        (folder / f"{name}.py").write_text(text)
        added.append(f"{probes.__name__}.{name}")

    yield add
    probe.get.cache_clear()
    for module in added:
        sys.modules.pop(module, None)
        vars(probes).pop(module.rpartition(".")[2], None)


def test_one_file_is_a_probe_in_configuration_and_artifacts(
    add_probe: Callable[[str, str], None], prepared: Artifact, decoder_artifact: Artifact, encoder_artifact: Artifact,
    context: StageContext, tmp_path: Path,
) -> None:  # fmt: skip
    tables = {"tasks": {"names": []}, "max_documents": 3, "baselines": [], "probes": {"latency": {"enabled": False}}}
    before = EvaluateConfig.model_validate(tables)
    add_probe("lengths", ONE_FILE)
    assert probe.names() == ["latency", "lengths", "relative", "samples"]
    assert EvaluateConfig.model_validate(tables).identity() == before.identity(), "a new file changes no evaluation"
    tables["probes"] = {"latency": {"enabled": False}, "lengths": {"longest": 20}}
    config = EvaluateConfig.model_validate(tables)
    assert config.identity()["probes"] == {"relative": {"enabled": True}, "lengths": {"enabled": True, "longest": 20}}
    for name, model in (("decoder", decoder_artifact), ("encoder", encoder_artifact)):
        (tmp_path / name).mkdir()
        summary = stage.run(config, {"prepare": prepared, "model": model}, tmp_path / name, context)
        evaluation = json.loads((tmp_path / name / "evaluation.json").read_text())
        observations = json.loads((tmp_path / name / "observations.json").read_text())
        if name == "decoder":
            assert evaluation["probes"]["lengths"] == summary["probes"]["lengths"] == {"mean": 20.0}
            assert observations["lengths"] == {"s": 0.5}
        else:
            assert (
                evaluation["skipped_probes"]["lengths"]
                == "it measures decoder models; the family of this one is encoder"
            )


def test_a_module_that_is_not_one_probe_is_refused(add_probe: Callable[[str, str], None]) -> None:
    add_probe("empty", '"""Nothing."""\n')
    with pytest.raises(TypeError, match=r"probes\.empty defines 0 probes; a module is one probe"):
        probe.get("empty")
    with pytest.raises(ValueError, match=r"no probe 'relativ'; did you mean 'relative'\? \(known: empty, latency, "):
        probe.get("relativ")
