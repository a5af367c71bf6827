"""Continuations and filled-in words against slow references: one forward pass a token, no cache, no library."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig, Family
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError, IntegrityError, NumericError
from pipelines.data import tokenizer as tokenization
from pipelines.measure.config import SamplingSettings
from pipelines.measure.prompts import NEW_TOKENS, Prompter
from pipelines.measure.scoring import Scorer

PROMPT = "The import statement <|eos|> is"
Drawn = Callable[[torch.Tensor], int]


@pytest.fixture(scope="module")
def models(prepared: Artifact) -> dict[Family, Prompter]:
    """An untrained model of each family with the tokenizer of the prepared data: what it writes has no meaning."""
    found: dict[Family, Prompter] = {}
    for family in ("decoder", "encoder"):
        shape = {"width": 32, "layers": 2, "heads": 2, "ffn_width": 48, "vocab_size": 512, "max_positions": 128}
        config = ArchitectureConfig(family=family, **shape, bos_id=0, eos_id=1, pad_id=2, mask_id=3, init_std=0.2)
        scorer = Scorer(build(config, seed=0).eval(), family, f"the {family}", "cpu")
        found[family] = Prompter(scorer, prepared.path / "tokenizer")
    return found


@pytest.fixture
def writer(models: dict[Family, Prompter]) -> Prompter:
    return models["decoder"]


@pytest.fixture
def filler(models: dict[Family, Prompter]) -> Prompter:
    return models["encoder"]


def by_hand(writer: Prompter, drawn: Drawn, tokens: int) -> str:
    """Write on after the start token and the prompt's text, with the whole sequence computed anew for every token."""
    ids = [0, *tokenization.encode(writer.tokenizer, [PROMPT])[0]]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + tokens and (ids[-1] != 1 or len(ids) == start):
            ids.append(drawn(writer.scorer.model(torch.tensor([ids])).logits[0, -1]))
    text: str = writer.tokenizer.decode(ids[start:], skip_special_tokens=True)
    return text


def test_a_special_token_that_is_spelled_out_in_a_prompt_is_text(writer: Prompter) -> None:
    ids = tokenization.encode(writer.tokenizer, [PROMPT])[0]
    assert min(ids) > 3
    assert writer.whole(PROMPT) == [0, *ids, 1]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 1, "seed": 5}])
def test_the_likeliest_token_each_time_is_what_a_slow_loop_writes(writer: Prompter, options: dict[str, Any]) -> None:
    sampling = SamplingSettings.model_validate(options)
    assert writer.continuation(PROMPT, sampling, 30) == by_hand(writer, lambda logits_V: int(logits_V.argmax()), 30)


@pytest.mark.parametrize(
    ("options", "cut"),
    [
        ({"temperature": 1.7}, lambda p_V: p_V),
        ({"temperature": 1.7, "top_k": 3}, lambda p_V: p_V.where(p_V >= p_V.topk(3).values[-1], 0.0)),
        ({"temperature": 1.7, "top_p": 0.6}, lambda p_V: nucleus(p_V, 0.6)),
    ],
)
def test_draws_are_from_all_tokens_or_from_those_that_were_asked_for(
    writer: Prompter, options: dict[str, Any], cut: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    def drawn(logits_V: torch.Tensor) -> int:
        chances_V = cut((logits_V / 1.7).softmax(-1))
        return int(torch.multinomial(chances_V / chances_V.sum(), 1))

    torch.manual_seed(3)
    slow = by_hand(writer, drawn, 25)
    assert writer.continuation(PROMPT, SamplingSettings(**options, seed=3), 25) == slow


def nucleus(chances_V: torch.Tensor, mass: float) -> torch.Tensor:
    order = chances_V.argsort(descending=True)
    before = chances_V[order].cumsum(0) - chances_V[order]
    kept = torch.zeros_like(chances_V)
    kept[order[before < mass]] = 1.0
    return chances_V * kept


def test_a_text_depends_on_its_seed_and_on_nothing_that_was_drawn_before(writer: Prompter) -> None:
    hot = SamplingSettings(temperature=1.5, seed=1)
    first = writer.continuation(PROMPT, hot, 20)
    torch.manual_seed(77)
    state = torch.get_rng_state()
    writer.continuation("Another", SamplingSettings(seed=9), 7)
    assert writer.continuation(PROMPT, hot, 20) == first
    assert torch.equal(torch.get_rng_state(), state), "the caller's draws are not touched"
    assert writer.continuation(PROMPT, SamplingSettings(temperature=1.5, seed=2), 20) != first


def test_what_does_not_fit_is_refused_and_the_default_is_what_fits(writer: Prompter) -> None:
    used = len(writer.whole(PROMPT)) - 1
    room = writer.positions - used
    with pytest.raises(ConfigError, match=rf"{used} tokens of prompt and {room + 1} new ones.*sequences of 128") as e:
        writer.continuation(PROMPT, SamplingSettings(), room + 1)
    assert f"let it write {room}" in str(e.value)
    with pytest.raises(ConfigError, match="give a shorter prompt"):
        writer.continuation("word " * 200, SamplingSettings(), None)
    long = "word " * ((writer.positions - 10) // len(tokenization.encode(writer.tokenizer, ["word "])[0]))
    left = writer.positions - len(writer.whole(long)) + 1
    assert left < NEW_TOKENS
    greedy = SamplingSettings(temperature=0.0)
    assert writer.continuation(long, greedy, None) == writer.continuation(long, greedy, left)


def test_a_damaged_model_is_told_from_one_that_writes_badly(writer: Prompter, filler: Prompter) -> None:
    for prompter, ask in (
        (writer, lambda p: p.continuation("The", SamplingSettings(temperature=0.0), 3)),
        (filler, lambda p: p.masked("The ___ is", 1)),
    ):
        damaged = copy.deepcopy(prompter.scorer.model)
        with torch.no_grad():
            next(damaged.parameters()).fill_(float("nan"))
        broken = copy.copy(prompter)
        broken.scorer = Scorer(damaged, prompter.scorer.family, "the model", "cpu")
        with pytest.raises(NumericError, match="the model gives logits that are not finite"):
            ask(broken)


def test_the_words_for_a_mask_are_the_likeliest_of_all(filler: Prompter) -> None:
    left, right = (tokenization.encode(filler.tokenizer, [text])[0] for text in ("The", " statement is a class."))
    ids = torch.tensor([[0, *left, 3, *right, 1]])
    with torch.no_grad():
        chances_V = filler.scorer.model(ids).logits[0, 1 + len(left)].softmax(-1)
    words = filler.masked("The ___ statement is a class.", 4)[0]
    assert [word.probability for word in words] == [round(float(p), 4) for p in chances_V.topk(4).values]
    assert [word.text for word in words] == [filler.tokenizer.decode([int(i)]) for i in chances_V.topk(4).indices]


def test_every_spelling_of_a_mask_is_the_mask_and_every_mask_gets_its_words(filler: Prompter) -> None:
    spellings = [f"The {mask} statement is a {mask}." for mask in ("___", "[MASK]", "<|mask|>", "_______")]
    answers = [filler.masked(text, 2) for text in spellings]
    assert all(answer == answers[0] for answer in answers)
    assert [len(words) for words in answers[0]] == [2, 2]
    with pytest.raises(ConfigError, match=r"there is no mask in 'The __ class'"):
        filler.masked("The __ class", 2)


def test_a_folder_without_tokenizer_is_refused(writer: Prompter, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"tokenizer\.json is missing"):
        Prompter(writer.scorer, tmp_path)


@pytest.mark.parametrize("name", ["top_k", "top_p", "seed"])
def test_what_does_nothing_without_draws_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} does nothing with temperature 0"):
        SamplingSettings.model_validate({"temperature": 0, name: 0.5 if name == "top_p" else 1})
