"""What the model makes of one validation text, written down after each validation: a loss that a person can read.

A decoder goes on with the first tokens of the first validation sequence, the likeliest token each time; an encoder
fills in the masks that validation shows it there. Nothing is drawn, so training goes on as if nobody had asked.

Every rank takes part, as in a validation: under ZeRO-3 a pass gathers the weights of all of them. A decoder's sample is
then as many gathers as it has tokens; where that is dear, `pretrain.samples = false`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from models.architectures import predict
from models.architectures.config import Family
from models.objectives.base import Ids
from pipelines.core.launcher import beat
from pipelines.training.callbacks import Callback, validation_is_due
from pipelines.training.data_loader import VALIDATION_EPOCH, DataLoader
from pipelines.training.distributed import Ranks
from pipelines.training.loss_module import Question
from pipelines.training.metrics import MetricsLog
from pipelines.training.trainer import State, StepResult, Trainer
from pipelines.training.worker_spec import WorkerSpec

PROMPT_TOKENS, NEW_TOKENS = 16, 20
"""Of a decoder, where sequences are long enough. Each new token is a pass of its own."""
SHOWN_TOKENS = 64
"""Of an encoder."""


class Samples(Callback):
    """Writes a sample after each validation.

    Args:
        log: `samples.jsonl`; None on every rank but the first.
        tokenizer: file of the tokenizer.
    """

    def __init__(self, log: MetricsLog | None, tokenizer: Path) -> None:
        self._log = log
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(tokenizer))
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token for token, about in added.items() if about.special}

    def on_start(self, trainer: Trainer) -> None:
        """Forget the samples of steps that are going to be taken anew."""
        if self._log is not None:
            self._log.cut_back(trainer.state.step)

    def before_checkpoint(self, trainer: Trainer) -> None:  # noqa: ARG002 - as callbacks are called
        """Put everything on the disk."""
        if self._log is not None:
            self._log.sync()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Ask the model when a validation has just been."""
        if not validation_is_due(trainer, result.step):
            return
        with trainer.times("sample"), _uncompiled() if trainer.config.compile else contextlib.nullcontext():
            sample = self._sample(trainer)
        if self._log is not None:
            self._log.append({"step": result.step} | sample)
        beat()

    def _sample(self, trainer: Trainer) -> dict[str, Any]:
        """Return prompt and text; every rank calls it."""
        engine = trainer.engine
        shown_BT, question = _asked(trainer.loader, trainer.config.family)
        answer_BT = engine.ask(question, torch.from_numpy(shown_BT).to(engine.ranks.device))
        prompt, answer = shown_BT[0].tolist(), answer_BT[0].tolist()
        if trainer.config.family == "decoder":  # what follows the end of a document is none of its text
            answer = list(itertools.takewhile(lambda token: token not in self._special, answer))
        mask = trainer.loader.objective.context.mask_id
        return {"prompt": self._text(prompt, mask), "text": self._text(answer, mask)}

    def _text(self, tokens: list[int], mask: int | None) -> str:
        """Return tokens as a person reads them: of the special ones only the mask is shown."""
        shown = [token for token in tokens if token == mask or token not in self._special]
        text: str = self._tokenizer.decode(shown, skip_special_tokens=False)
        return text


def _asked(loader: DataLoader, family: Family) -> tuple[Ids, Question]:
    """Return what the model is shown [1, T], and what is asked of it."""
    first = np.zeros(1, dtype=np.int64)
    tokens_BT = loader.validation.take(first)
    length = tokens_BT.shape[1]
    if family == "decoder":
        shown = min(PROMPT_TOKENS, length // 2)
        return tokens_BT[:, :shown], functools.partial(predict.greedy, count=min(NEW_TOKENS, length - shown))
    inputs_BT, _ = loader.objective.targets(tokens_BT, first, first + VALIDATION_EPOCH)
    return inputs_BT[:, :SHOWN_TOKENS], functools.partial(predict.filled_in, mask_id=loader.objective.context.mask_id)


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which nothing is compiled: every length of a growing text would be compiled anew."""
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def opened_samples(spec: WorkerSpec, state: State, ranks: Ranks) -> Iterator[list[Callback]]:
    """Give the callback, if it is wanted, with its file open at the step that training goes on from, on rank 0 only."""
    if not spec.config.samples:
        yield []
        return
    log = MetricsLog(spec.samples, resume_at=state.step) if ranks.rank == 0 else None
    try:
        yield [Samples(log, spec.data / "tokenizer" / "tokenizer.json")]
    finally:
        if log is not None:
            log.close()
