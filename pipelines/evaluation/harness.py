"""Runs tasks through lm-eval's own harness, and gives it encoders as a model class of its own."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import hash_string

from pipelines.core import progress_bars
from pipelines.core.errors import ConfigError, NumericError
from pipelines.evaluation import named_tasks
from pipelines.evaluation.config import HarnessTask
from pipelines.evaluation.tasks import Task
from pipelines.measure import intervals
from pipelines.measure.scoring import Scorer, negative_log_likelihood
from pipelines.measure.windows import Batch

VERSION: str = lm_eval.__version__
_RUNNING = threading.Lock()


@dataclass(frozen=True)
class Outcome:
    """The result of one task."""

    accuracy: float
    stderr: float
    n: int
    chance: float
    hash: str
    """lm-eval's hash over items, prompts and targets: equal hashes, same questions."""
    correct: tuple[int, ...]
    """0 or 1 for each item, in the order of the data file."""

    def to_json(self, confidence: float) -> dict[str, Any]:
        """Return the row of evaluation.json; a task whose interval holds chance does not inform of the model."""
        interval = intervals.proportion(sum(self.correct), self.n, confidence)
        return {
            "accuracy": self.accuracy,
            "stderr": self.stderr,
            "low": interval.low,
            "high": interval.high,
            "n": self.n,
            "chance": self.chance,
            "informative": not interval.low <= self.chance <= interval.high,
            "hash": self.hash,
        }


def run(
    scorer: Scorer, tokenizer: Any, tasks: Sequence[Task], *, folder: Path, cache: Path, batch_size: int
) -> dict[str, Outcome]:
    """Run tasks with lm-eval and return their outcomes by name.

    Args:
        scorer: the loaded model.
        tokenizer: its tokenizer, as transformers loads it.
        tasks: what to run; their files are in `folder`.
        folder: written by `tasks.write`.
        cache: folder for the tables that `datasets` makes of the data files.
        batch_size: sequences per forward pass.

    Raises:
        NumericError: a log likelihood is not finite.
        ConfigError: an answer is longer than all that an encoder sees at once.
    """
    if not tasks:
        return {}
    with _RUNNING, _quietly():
        model = as_lm(scorer, tokenizer, batch_size)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        # Not `simple_evaluate`: that also seeds the global generators and asks pip, git and the driver for their
        # versions, which takes longer than the tasks.
        results = evaluate(model, manager.load([_absolute(task, folder, cache) for task in tasks]))
    return {task.name: _outcome(task, results, scorer.name) for task in tasks}


def run_named(
    scorer: Scorer, tokenizer: Any, tasks: Sequence[HarnessTask], *, scratch: Path, batch_size: int
) -> tuple[dict[str, Outcome], dict[str, str]]:
    """Run tasks that come with lm-eval, or that a file of the user's describes.

    Args:
        scorer: the loaded model.
        tokenizer: its tokenizer, as transformers loads it.
        tasks: what to run.
        scratch: folder for task files and the tables that `datasets` makes.
        batch_size: sequences per forward pass.

    Returns:
        Outcomes by name, and the reason for each task that this family of models cannot do.

    Raises:
        NumericError: a log likelihood is not finite.
        ConfigError: there is no such task, its data cannot be had, or it does not say what is right.
    """
    outcomes: dict[str, Outcome] = {}
    skipped: dict[str, str] = {}
    if not tasks:
        return outcomes, skipped
    with _RUNNING, _quietly():
        model = as_lm(scorer, tokenizer, batch_size)
        for task in tasks:
            loaded = named_tasks.load(task, scratch)
            kind = str(loaded["tasks"][task.name].OUTPUT_TYPE)
            if scorer.family == "encoder" and kind not in {"multiple_choice", "loglikelihood"}:
                skipped[task.name] = f"an encoder scores continuations; it does no {kind}"
                continue
            items = None if task.limit is None else {task.name: named_tasks.first(loaded, task)}
            results = evaluate(model, loaded, samples=items)
            outcomes[task.name] = _named_outcome(task.name, results, kind, scorer.name)
    return outcomes, skipped


def as_lm(scorer: Scorer, tokenizer: Any, batch_size: int) -> LM:
    """Return a model as lm-eval sees it; a special token spelled out in a task is text, as it was in training.

    Args:
        scorer: the loaded model.
        tokenizer: its tokenizer, as transformers loads it; changed to cut such texts in that way.
        batch_size: sequences per forward pass.
    """
    tokenizer.split_special_tokens = True
    if scorer.family == "decoder":
        return CausalLM(pretrained=scorer.model, tokenizer=tokenizer, batch_size=batch_size)
    return MaskedLM(scorer, tokenizer, batch_size)


def _absolute(task: Task, folder: Path, cache: Path) -> dict[str, Any]:
    files = {"test": str((folder / f"{task.name}.jsonl").resolve())}
    return task.config | {"dataset_kwargs": {"data_files": files, "cache_dir": str(cache)}}


def _outcome(task: Task, results: dict[str, Any], model: str) -> Outcome:
    samples = sorted(results["samples"][task.name], key=lambda sample: sample["doc_id"])
    return _of_samples(results["results"][task.name], "acc,none", samples, task.chance, f"{model} in task {task.name}")


def _named_outcome(name: str, results: dict[str, Any], kind: str, model: str) -> Outcome:
    """Return the outcome of a task that we did not make: guessing finds one of its choices, or nothing."""
    key, samples = named_tasks.answers(name, results)
    chances = [1.0 / len(sample["filtered_resps"]) if kind == "multiple_choice" else 0.0 for sample in samples]
    chance = float(np.mean(chances))
    return _of_samples(results["results"][name], key, samples, chance, f"{model} in task {name}")


def _of_samples(row: dict[str, Any], key: str, samples: list[dict[str, Any]], chance: float, where: str) -> Outcome:
    metric, _, used = key.partition(",")
    scores = [r[0] for sample in samples for r in sample["filtered_resps"] if isinstance(r, tuple | list)]
    if not bool(torch.isfinite(torch.tensor(scores, dtype=torch.float64)).all()):
        raise NumericError(f"{where}: log likelihoods that are not finite")
    return Outcome(
        accuracy=float(row[key]),
        stderr=float(row[f"{metric}_stderr,{used}"]),
        n=len(samples),
        chance=chance,
        hash=hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples)),
        correct=tuple(int(sample[metric]) for sample in samples),
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the harness's bars and notes out of the terminal, where the run shows its own progress."""
    logger, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with progress_bars.bars():
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


class CausalLM(HFLM):
    """lm-eval's own class for decoders, without its progress bars."""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """See `HFLM.loglikelihood`."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)


class MaskedLM(LM):
    """An encoder as lm-eval sees it.

    A continuation of k tokens is scored from left to right: token i is predicted with the tokens before it in sight
    and the k - i tokens from it on masked (Kauf and Ivanova 2023), so that the pieces of a word do not give each
    other away.

    Args:
        scorer: the loaded encoder.
        tokenizer: its tokenizer, with a start and a mask token.
        batch_size: sequences per forward pass.
    """

    def __init__(self, scorer: Scorer, tokenizer: Any, batch_size: int) -> None:
        super().__init__()
        self._scorer, self._tokenizer, self._batch_size = scorer, tokenizer, batch_size

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return (log likelihood in nats, whether every token is the most likely one) of each request."""
        rows = [row for number, request in enumerate(requests) for row in self._rows(number, *request.args)]
        rows.sort(key=lambda row: -len(row[1]))
        nats, greedy = np.zeros(len(requests)), np.ones(len(requests), dtype=bool)
        for start in range(0, len(rows), self._batch_size):
            batch = _one_per_row(rows[start : start + self._batch_size])
            with torch.inference_mode():
                logits_NV = self._scorer.logits(batch).cpu()
                targets = torch.from_numpy(batch.targets)
                scored = negative_log_likelihood(logits_NV, targets).double().numpy()
            np.add.at(nats, batch.documents, scored)
            np.logical_and.at(greedy, batch.documents, (logits_NV.argmax(dim=-1) == targets).numpy())
        return [(-float(n), bool(g)) for n, g in zip(nats, greedy, strict=True)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refused: an encoder gives a text no likelihood."""
        raise NotImplementedError("an encoder gives a text no likelihood")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Refused: an encoder does not generate."""
        raise NotImplementedError("an encoder does not generate text")

    def _rows(self, number: int, context: str, continuation: str) -> Iterator[tuple[int, list[int], int, int]]:
        """Yield (request, shown tokens, scored position, target) for each token of the continuation."""
        seen = self._tokenizer.encode(context, add_special_tokens=False)
        pieces = self._tokenizer.encode(context + continuation, add_special_tokens=False)[len(seen) :]
        room = self._scorer.model.config.max_position_embeddings - 1 - len(pieces)
        if room < 0:
            raise ConfigError(
                f"{self._scorer.name} shows {self._scorer.model.config.max_position_embeddings} tokens at once: the "
                f"start token and the {len(pieces)} tokens of {continuation!r} do not fit",
                hint="leave the task out of evaluate.tasks.names",
            )
        prefix = [self._tokenizer.bos_token_id, *seen[max(0, len(seen) - room) :]]
        for i, target in enumerate(pieces):
            hidden = [self._tokenizer.mask_token_id] * (len(pieces) - i)
            yield number, prefix + pieces[:i] + hidden, len(prefix) + i, target


def _one_per_row(rows: list[tuple[int, list[int], int, int]]) -> Batch:
    ids = np.zeros((len(rows), max(len(row[1]) for row in rows)), dtype=np.int64)
    shown = np.zeros(ids.shape, dtype=np.bool_)
    for i, (_, tokens, _, _) in enumerate(rows):
        ids[i, : len(tokens)] = tokens
        shown[i, : len(tokens)] = True
    columns, targets, requests = (np.array([row[k] for row in rows]) for k in (2, 3, 0))
    return Batch(ids, shown, np.arange(len(rows)), columns, targets, requests)
