"""The tasks in lm-eval's own harness: against hand computation, against its command line, and against chance."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.data import tokenizer as tokenization
from pipelines.evaluation import harness, tasks
from pipelines.evaluation.config import TaskConfig
from pipelines.evaluation.harness import Outcome
from pipelines.evaluation.tasks import Task
from pipelines.measure import heldout, scoring


@pytest.fixture(scope="module")
def made(prepared: Artifact) -> list[Task]:
    documents = heldout.load(prepared.path).documents
    return tasks.generate(TaskConfig(items=40), documents, "decoder")[0]


@pytest.fixture(scope="module")
def folder(made: list[Task], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tasks")
    tasks.write(made, place)
    return place


def _run(source: Artifact, made: list[Task], folder: Path, cache: Path, batch_size: int = 16) -> dict[str, Outcome]:
    model = source.path / "model"
    return harness.run(
        scoring.load(model, "cpu"),
        AutoTokenizer.from_pretrained(model),
        made,
        folder=folder,
        cache=cache,
        batch_size=batch_size,
    )


@pytest.fixture(scope="module")
def outcomes(
    decoder_artifact: Artifact, made: list[Task], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    return _run(decoder_artifact, made, folder, tmp_path_factory.mktemp("cache"))


def _log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """Return ln p(continuation | context) and whether it is what greedy decoding writes, by one plain forward pass."""
    seen = len(tokenizer.encode(context, add_special_tokens=False))
    ids = tokenizer.encode(context + continuation, add_special_tokens=False)[-129:]
    seen -= len(tokenizer.encode(context + continuation, add_special_tokens=False)) - len(ids)
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
    pairs = [(i - 1, ids[i]) for i in range(seen, len(ids))]
    greedy = all(int(log_p[i].argmax()) == token for i, token in pairs)
    return sum(float(log_p[i, token]) for i, token in pairs), greedy


def test_three_tasks_are_made_for_a_decoder(made: list[Task], outcomes: dict[str, Outcome]) -> None:
    assert [task.name for task in made] == ["next_line", "cloze", "addition"] == list(outcomes)
    assert [task.chance for task in made] == [0.25, 0.25, 0.0]
    assert all(outcome.n == len(task.items) for task, outcome in zip(made, outcomes.values(), strict=True))


def test_multiple_choice_outcomes_equal_hand_computed_likelihoods(
    made: list[Task], outcomes: dict[str, Outcome], decoder: Any, decoder_artifact: Artifact
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(decoder_artifact.path / "model")
    for task in made[:2]:
        for item, correct in zip(task.items, outcomes[task.name].correct, strict=True):
            scores = [
                _log_likelihood(decoder, tokenizer, item["context"], task.config["target_delimiter"] + choice)[0]
                for choice in item["choices"]
            ]
            first, second = sorted(scores)[-1:-3:-1]
            if first - second > 1e-3:
                assert correct == (scores.index(first) == item["label"])


def test_addition_is_right_exactly_when_greedy_decoding_writes_the_sum(
    made: list[Task], outcomes: dict[str, Outcome], decoder: Any, decoder_artifact: Artifact
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(decoder_artifact.path / "model")
    for item, correct in zip(made[2].items, outcomes["addition"].correct, strict=True):
        assert correct == _log_likelihood(decoder, tokenizer, item["context"], item["answer"])[1]


def test_addition_rewards_a_model_that_can_add(made: list[Task], folder: Path, tmp_path: Path) -> None:
    """A model that always writes the right digits scores 1: the task can be won."""

    class Calculator(harness.LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            sums = [sum(map(int, request.args[0].removesuffix("=").split("+"))) for request in requests]
            return [(0.0, request.args[1] == str(s)) for request, s in zip(requests, sums, strict=True)]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError

    config = harness._absolute(made[2], folder, tmp_path)
    with harness._quietly():
        results = harness.evaluate(Calculator(), harness.TaskManager(include_defaults=False).load([config]))
    assert results["results"]["addition"]["acc,none"] == 1.0


def test_accuracy_and_standard_error_follow_from_the_outcomes(outcomes: dict[str, Outcome]) -> None:
    for outcome in outcomes.values():
        mean = sum(outcome.correct) / outcome.n
        assert outcome.accuracy == pytest.approx(mean)
        assert outcome.stderr == pytest.approx(math.sqrt(mean * (1 - mean) / (outcome.n - 1)), abs=1e-12)


def test_shuffled_labels_bring_every_multiple_choice_back_to_chance(
    decoder_artifact: Artifact, prepared: Artifact, tmp_path: Path
) -> None:
    """The null of the whole chain: with labels drawn anew no model can know the answer."""
    documents = heldout.load(prepared.path).documents
    made, _ = tasks.generate(TaskConfig(items=120, names=("next_line", "cloze")), documents, "decoder")
    rng = random.Random(7)
    null = [replace(task, items=[item | {"label": rng.randrange(4)} for item in task.items]) for task in made]
    tasks.write(null, tmp_path / "tasks")
    for outcome in _run(decoder_artifact, null, tmp_path / "tasks", tmp_path / "cache", 64).values():
        assert abs(outcome.accuracy - 0.25) < 3.5 * outcome.stderr


def test_the_same_questions_have_the_same_hash_and_others_another(
    decoder_artifact: Artifact, made: list[Task], folder: Path, outcomes: dict[str, Outcome], tmp_path: Path
) -> None:
    cloze = made[1]
    again = _run(decoder_artifact, [cloze], folder, tmp_path / "cache")["cloze"]
    assert again == outcomes["cloze"]
    fewer = replace(cloze, items=cloze.items[:-1])
    tasks.write([fewer], tmp_path / "tasks")
    assert _run(decoder_artifact, [fewer], tmp_path / "tasks", tmp_path / "cache")["cloze"].hash != again.hash


@pytest.mark.slow
def test_a_user_with_the_lm_eval_command_gets_the_same_numbers(
    decoder_artifact: Artifact, folder: Path, outcomes: dict[str, Outcome], tmp_path: Path
) -> None:
    """Run from the artifact's task folder, as the header of each task file says, with no network."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--include_path", ".", "--device", "cpu"]
    command += ["--model_args", f"pretrained={decoder_artifact.path / 'model'}", "--tasks", ",".join(outcomes)]
    command += ["--output_path", str(tmp_path / "out"), "--batch_size", "16"]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]
    for name, outcome in outcomes.items():
        assert theirs[name]["acc,none"] == pytest.approx(outcome.accuracy)
        assert theirs[name]["acc_stderr,none"] == pytest.approx(outcome.stderr)


def test_the_harness_leaves_the_generator_of_torch_the_loggers_and_the_terminal_alone(
    decoder_artifact: Artifact, made: list[Task], folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1, generator=torch.Generator().manual_seed(5))
    level = logging.getLogger("lm_eval").level
    capfd.readouterr()
    _run(decoder_artifact, made[:1], folder, tmp_path)
    assert torch.equal(torch.rand(1), expected)
    assert logging.getLogger("lm_eval").level == level
    assert "it/s" not in capfd.readouterr().err


def test_an_encoder_scores_a_word_from_left_to_right(encoder: Any, encoder_artifact: Artifact) -> None:
    """Each piece sees the pieces before it; the later ones are masked."""
    tokenizer = AutoTokenizer.from_pretrained(encoder_artifact.path / "model")
    model = harness.MaskedLM(scoring.load(encoder_artifact.path / "model", "cpu"), tokenizer, 3)

    class Request:
        def __init__(self, *args: str) -> None:
            self.args = args

    requests = [Request("The statement", " evaluates"), Request("x", " is"), Request("It", " " + "unpronounceable")]
    for request, (found, greedy) in zip(requests, model.loglikelihood(requests), strict=True):  # type: ignore[arg-type]
        context, word = request.args
        seen = tokenizer.encode(context, add_special_tokens=False)
        pieces = tokenizer.encode(context + word, add_special_tokens=False)[len(seen) :]
        expected, best = 0.0, True
        for i, piece in enumerate(pieces):
            shown = torch.tensor([[0, *seen, *pieces[:i], *[3] * (len(pieces) - i)]])
            with torch.no_grad():
                log_p = torch.log_softmax(encoder(input_ids=shown).logits[0, 1 + len(seen) + i].double(), dim=-1)
            expected += float(log_p[piece])
            best &= int(log_p.argmax()) == piece
        assert found == pytest.approx(expected, rel=1e-5)
        assert greedy == best
    for refused in (model.loglikelihood_rolling, model.generate_until):
        with pytest.raises(NotImplementedError, match="an encoder"):
            refused([])


@pytest.mark.parametrize("spare", [0, 1, 3])
def test_a_word_that_fills_the_encoder_leaves_that_much_context(spare: int, encoder: Any, prepared: Artifact) -> None:
    """With no room for context there is none: a slice from the end would take all of it."""
    tokenizer = AutoTokenizer.from_pretrained(prepared.path / "tokenizer")
    context, word = "The statement after it", " unpronounceable"
    seen = tokenizer.encode(context, add_special_tokens=False)
    pieces = tokenizer.encode(context + word, add_special_tokens=False)[len(seen) :]
    assert len(seen) > 3
    small = copy.copy(encoder)
    small.config = copy.deepcopy(encoder.config)
    small.config.max_position_embeddings = 1 + spare + len(pieces)
    model = harness.MaskedLM(scoring.Scorer(small, "encoder", "the model", "cpu"), tokenizer, 3)
    rows = list(model._rows(0, context, word))
    assert {len(shown) for _, shown, _, _ in rows} == {small.config.max_position_embeddings}
    assert [shown[1 : 1 + spare] for _, shown, _, _ in rows] == [seen[len(seen) - spare :]] * len(pieces)
    assert [position for _, _, position, _ in rows] == [1 + spare + i for i in range(len(pieces))]


def test_a_word_that_does_not_fit_into_the_encoder_is_refused(encoder: Any, prepared: Artifact) -> None:
    tokenizer = AutoTokenizer.from_pretrained(prepared.path / "tokenizer")
    small = copy.copy(encoder)
    small.config = copy.deepcopy(encoder.config)
    small.config.max_position_embeddings = 4
    model = harness.MaskedLM(scoring.Scorer(small, "encoder", "the model", "cpu"), tokenizer, 3)
    with pytest.raises(ConfigError, match="shows 4 tokens at once: the start token and the "):
        list(model._rows(0, "The statement", " unpronounceable"))


def test_an_encoder_runs_the_cloze_and_skips_the_others_by_name(
    encoder_artifact: Artifact, prepared: Artifact, tmp_path: Path
) -> None:
    documents = heldout.load(prepared.path).documents
    made, skipped = tasks.generate(TaskConfig(items=20), documents, "encoder")
    assert [task.name for task in made] == ["cloze"]
    assert set(skipped) == {"next_line", "addition"}
    tasks.write(made, tmp_path / "tasks")
    outcome = _run(encoder_artifact, made, tmp_path / "tasks", tmp_path / "cache")["cloze"]
    assert outcome.n == 20
    assert 0.0 <= outcome.accuracy <= 1.0


def test_a_task_without_items_is_skipped_with_the_reason() -> None:
    poor = (heldout.Document("1", "x y", "s"), heldout.Document("2", "z", "s"))
    made, skipped = tasks.generate(TaskConfig(items=4), poor, "decoder")
    assert [task.name for task in made] == ["addition"]
    assert skipped["cloze"] == "the test split gives 0 items; at least 2 are needed"


def test_task_files_name_their_data_relative_to_the_folder_and_say_how_to_run_them(folder: Path) -> None:
    for name in ("next_line", "cloze", "addition"):
        text = (folder / f"{name}.yaml").read_text()
        assert text.startswith("# Run from this folder: lm-eval run ")
        assert yaml.safe_load(text)["dataset_kwargs"] == {"data_files": {"test": f"{name}.jsonl"}}


@pytest.mark.parametrize("family", ["decoder", "encoder"])
@pytest.mark.parametrize("special", tokenization.SPECIAL_TOKENS)
def test_a_special_token_spelled_in_a_task_is_the_text_that_packing_sees(
    special: str, family: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(f"{family}_artifact").path / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    lm = harness.as_lm(scoring.load(model, "cpu"), tokenizer, 1)
    text = f"before{special}after"
    (expected,) = tokenization.encode(Tokenizer.from_file(str(model / heldout.TOKENIZER)), [text])
    assert not set(expected) & set(range(4))
    if isinstance(lm, harness.CausalLM):
        assert lm.tok_encode(text) == expected
        assert lm.tok_batch_encode([text])[0].tolist() == [expected]
        context, continuation = lm._encode_pair("before", f"{special}after")
        assert [*context, *continuation] == expected
    else:
        assert tokenizer.encode(text, add_special_tokens=False) == expected


def test_no_tasks_give_no_outcomes(decoder: Any) -> None:
    scorer = scoring.Scorer(decoder, "decoder", "the model", "cpu")
    assert harness.run(scorer, None, [], folder=Path(), cache=Path(), batch_size=1) == {}
