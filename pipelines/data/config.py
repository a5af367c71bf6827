"""Configuration of the corpus and of the prepare stage. Imports neither torch nor DVC."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from pipelines.core import fingerprint
from pipelines.core.settings import NOT_IDENTITY, PATH, Settings, absolute, start_of
from pipelines.data import tokenizer_files
from pipelines.data.rules import registry
from pipelines.data.rules.base import RuleConfig

TOKENIZER_WORDS = ("train", "init_weights")
"""Values of `prepare.tokenizer` that are no path."""


class DataConfig(Settings):
    """Which corpus. None of this is identity: the DVC hash that it leads to is."""

    path: str = Field(
        "data",
        description="Folder or file of the corpus, inside the project: relative to it, or absolute, also with `~`.",
        json_schema_extra=NOT_IDENTITY,
    )
    dvc_file: str | None = Field(
        None,
        description="DVC file that tracks it; unset for the one that DVC writes beside the corpus, as `data.dvc`.",
        json_schema_extra=NOT_IDENTITY,
    )
    rev: str | None = Field(
        None,
        description="Git revision (tag, branch, commit) whose corpus is used; unset for the one in the work tree.",
        json_schema_extra=NOT_IDENTITY,
    )

    @property
    def tracked_by(self) -> str:
        """The DVC file that tracks the corpus, relative to the project."""
        return self.dvc_file or f"{self.path}.dvc"

    @field_validator("path", "dvc_file")
    @classmethod
    def _inside_the_project(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        place = value
        if value.startswith(("/", "~")):
            root = (start_of(info) or Path()).resolve()
            whole = Path(absolute(value))
            place = whole.relative_to(root).as_posix() if whole.is_relative_to(root) else ""
        if not place or place == "." or ".." in place.split("/"):
            raise ValueError(
                f"{value!r} must be a path inside the project; `ingot data import` takes in a corpus from elsewhere"
            )
        return PurePosixPath(place).as_posix()

    @field_validator("rev")
    @classmethod
    def _a_revision(cls, value: str | None) -> str | None:
        # git would read a leading dash as an option.
        if value is not None and (not value.strip() or value.startswith("-") or ":" in value):
            raise ValueError(f"{value!r} is not a git revision: name a tag, a branch or a commit")
        return value


class FieldNames(Settings):
    """Which field or column of a record is what; `a.b` is the field b of the object a."""

    text: str = Field("text", min_length=1, description="The text.")
    id: str = Field("id", min_length=1, description="The id; where a record has none, its file and number are.")
    source: str = Field("source", min_length=1, description="What counts, licences and the model card are told by.")
    license: str = Field("license", min_length=1, description="The licence.")
    work: str = Field("work", min_length=1, description="What the document is a part of: no work straddles splits.")
    metadata: tuple[str, ...] | None = Field(
        None, description="Fields that are kept beside the document; unset for all others, [] for none."
    )


class TokenizerTraining(Settings):
    """How a tokenizer is trained."""

    model: Literal["bpe", "unigram", "wordpiece"] = Field(
        "bpe", description="Kind of vocabulary; each has every byte in it, so that no text is unknown."
    )
    pre_tokenizer: Literal["llama3", "gpt2"] = Field(
        "llama3", description="What a word is, which no token reaches over: the pattern of Llama 3, or that of GPT-2."
    )
    single_digits: bool = Field(False, description="Each digit is a token; false: up to three (gpt2: any number).")
    max_token_length: int | None = Field(
        None, ge=2, description="Bytes of a token at most (bpe, unigram); none: as long as a word."
    )
    max_word: int = Field(
        1000, ge=16, description="Characters without a break after which a text is cut for training the tokenizer."
    )
    sample_bytes: int = Field(
        256 << 20, ge=1 << 12, description="Text of the train split that it is trained on, about; drawn with the seed."
    )

    @model_validator(mode="after")
    def _every_setting_counts(self) -> Self:
        if self.model == "wordpiece" and self.max_token_length is not None:
            raise ValueError("max_token_length does nothing here: it goes with model = bpe or unigram")
        return self


ITEM_FILES = (".jsonl", ".parquet", ".txt")
"""Files that hold the items of an evaluation set: a JSON value, a row or a text a line."""


class EvaluationSet(Settings):
    """Items that the training text must not hold: a file, or a task of lm-eval. A text in its place names either."""

    task: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]*$", description="Task that comes with lm-eval.")
    file: str = Field(
        default="", description="File of items: .jsonl, .parquet or .txt.", json_schema_extra=NOT_IDENTITY | PATH
    )
    sha256: str = Field(
        default="",
        pattern=r"^([0-9a-f]{64})?$",
        description="Of the file; found when the recipe is read, and checked where it is given.",
    )

    @property
    def label(self) -> str:
        """What the report calls it."""
        return self.task or Path(self.file).name

    @model_validator(mode="before")
    @classmethod
    def _pinned(cls, value: Any, info: ValidationInfo) -> Any:
        """Tell a file from a task, make its path absolute, and find out what it holds."""
        if isinstance(value, str):
            value = {"file" if value.endswith(ITEM_FILES) or "/" in value else "task": value}
        if not isinstance(value, Mapping) or not value.get("file"):
            return value
        path = Path(absolute(str(value["file"]), start_of(info)))
        if not path.name.endswith(ITEM_FILES):
            raise ValueError(f"{path}: a file of items ends in {', '.join(ITEM_FILES)}")
        if not path.is_file():
            raise ValueError(f"{path} is not there; the name of a task has no slash and no such ending")
        actual = fingerprint.hash_file(path)
        if value.get("sha256") not in {None, "", actual}:
            raise ValueError(f"{path} has sha256 {actual}, expected {value['sha256']}")
        return {**value, "file": str(path), "sha256": actual}

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if bool(self.task) == bool(self.file):
            raise ValueError("an evaluation set is a `file` or a `task`, one of the two")
        return self


class ContaminationConfig(Settings):
    """What is done where training text holds 13-word runs of the held-out text, or items of `decontaminate`."""

    action: Literal["passage", "document", "refuse"] = Field(
        "passage",
        description="passage: cut the sentences or lines that hold them from the training text; document: drop the "
        "training document; refuse: stop with exit code 8.",
    )
    max_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="With refuse: share of the held-out runs that is borne; unset: 0.05. Items are never borne.",
    )

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.max_share is not None and self.action != "refuse":
            raise ValueError(f"max_share does nothing with the action {self.action!r}: nothing shared is left")
        return self


class PassagesConfig(Settings):
    """Passages that an earlier document of the corpus holds."""

    words: int = Field(
        50, ge=0, le=10_000, description="Words of the shortest passage that is cut from later documents; 0 cuts none."
    )
    scope: Literal["corpus", "source"] = Field(
        "corpus", description="Which documents are compared: all, or those of one source."
    )

    @field_validator("words")
    @classmethod
    def _long_enough(cls, value: int) -> int:
        if 0 < value < 10:
            raise ValueError(f"passages of {value} words are phrases that any two texts share: give 10 or more, or 0")
        return value


class PrepareConfig(Settings):
    """From corpus to tokenizer and packed sequences."""

    files: tuple[str, ...] = Field(
        ("*",),
        min_length=1,
        description="Which files of the corpus are read: patterns as in .gitignore, the last that matches decides, `!` "
        'takes out: ["*", "!LICENSE"], ["*.jsonl.gz"]. A file that they choose and that cannot be read stops the '
        "stage with exit code 3.",
    )
    fields: FieldNames = Field(default_factory=FieldNames, description="Which field or column is what.")
    formats: dict[str, Literal["jsonl", "json", "csv", "parquet", "warc", "text", "html"]] = Field(
        default_factory=dict,
        description='Pattern -> format of the files whose content does not tell it: {"*.html" = "html"} reads pages, '
        'which are refused otherwise, {"*.json" = "text"} takes files as plain text.',
    )

    vocab_size: int = Field(
        4096, ge=260, le=1_000_000, description="Tokens in the vocabulary: 4 special, 256 bytes, the rest merges."
    )
    tokenizer: str = Field(
        "train",
        description="train: learn one on this corpus; init_weights: take that of the model in base.from, as "
        "tuning on another corpus needs; anything else is a folder with a Hugging Face tokenizer, or an artifact "
        "(vocab_size is then that of the tokenizer).",
        json_schema_extra={"path": True, "words": ["train", "init_weights"]},
    )
    tokenizer_training: TokenizerTraining = Field(
        default_factory=TokenizerTraining, description="How the tokenizer is trained."
    )
    packing: Literal["best_fit", "concatenated"] = Field(
        "best_fit",
        description="best_fit: a document that fits a sequence is never cut, what stays free is padding; concatenated: "
        "documents end to end, cut where a sequence ends, without padding.",
    )
    pack_by: Literal["corpus", "source"] = Field(
        "corpus",
        description="corpus: a training sequence may hold documents of several sources; source: of one, as "
        "`pretrain.mixture` needs it.",
    )
    sequence_length: int = Field(256, ge=8, le=1_048_576, description="Tokens per packed sequence.")
    seed: int = Field(
        # For the bundled corpus this one holds out 3.6 % each for validation and test, with plays, scripture and
        # manuals in both. Two texts of one play would count as two pieces of evidence: test has modern texts only.
        2703,
        ge=0,
        lt=2**32,
        description="Seed of the split and of the MinHash permutations.",
    )
    validation_fraction: float = Field(0.035, gt=0, lt=0.5, description="Expected share of the works in validation.")
    test_fraction: float = Field(0.035, gt=0, lt=0.5, description="Expected share of the works in test.")
    max_held_out_characters: int | None = Field(
        50_000_000,
        ge=1,
        description="Text in validation and in test at most, in characters each, at least one work; what is more of "
        "their shares trains; none: no bound.",
    )
    min_held_out_documents: int = Field(
        2, ge=1, description="Fewest documents in validation and in test each; evaluation needs 2 to tell a difference."
    )
    max_bad_fraction: float = Field(
        1e-4, ge=0, le=1, description="Share of malformed records above which the stage stops with exit code 3."
    )
    max_line_bytes: int = Field(
        16 << 20, ge=1 << 10, le=1 << 30, description="A longer line or record is quarantined unread; bounds memory."
    )
    max_expansion: int = Field(
        2000,
        ge=10,
        description="Plain bytes that a compressed one may become, beyond the first 64 MiB; a file that expands "
        "further is refused.",
        json_schema_extra=NOT_IDENTITY,
    )
    max_window_bytes: int = Field(
        128 << 20,
        ge=1 << 20,
        le=1 << 31,
        description="Memory for decompressing one file; what needs more (`zstd --long=31`) is refused.",
        json_schema_extra=NOT_IDENTITY,
    )
    min_characters: int = Field(100, ge=1, description="Shorter documents are dropped.")
    max_characters: int = Field(1_000_000, ge=1, description="Longer documents are dropped.")
    max_repeated_lines: float = Field(
        0.4, gt=0, le=1, description="Largest share of a document's characters in lines that repeat an earlier line."
    )
    max_repeated_ngrams: float = Field(
        0.4, gt=0, le=1, description="Largest share of a document's 10-word runs that repeat an earlier run."
    )
    near_duplicate_similarity: float = Field(
        0.5, ge=0.3, le=1, description="Jaccard similarity of word shingles from which two documents are duplicates."
    )
    shingle_words: int = Field(5, ge=1, le=32, description="Words per shingle.")
    permutations: int = Field(128, ge=16, le=1024, multiple_of=4, description="MinHash permutations per document.")
    rules: tuple[SerializeAsAny[RuleConfig], ...] = Field(
        default=(  # type: ignore[arg-type]  # validated below
            {"name": "characters"},
            {"name": "boilerplate"},
            {"name": "repetition", "max_top_2": 0.4, "max_top_3": 0.45, "max_top_4": 0.5},
        ),
        description="What else a document must pass, in order, one table each: its `name` is a module of "
        "pipelines/data/rules, `sources` are patterns of sources that it is for (none: all), the rest its settings.",
    )
    mask: tuple[Literal["email", "ip", "phone", "key", "card"], ...] = Field(
        (), description="Personal data that is replaced by its kind in brackets, as [email]."
    )
    repeated_passages: PassagesConfig = Field(
        default_factory=PassagesConfig, description="Passages that several documents hold."
    )
    contamination: ContaminationConfig = Field(
        default_factory=ContaminationConfig, description="Held-out text in the training text."
    )
    decontaminate: tuple[EvaluationSet, ...] = Field(
        (), description="Evaluation sets whose items the training text must not hold: files, and tasks of lm-eval."
    )
    shard_bytes: int = Field(
        64 << 20, ge=1 << 12, le=1 << 34, description="Size above which a shard of sequences is closed."
    )
    workers: int = Field(
        2, ge=1, le=256, description="Processes that clean and hash documents.", json_schema_extra=NOT_IDENTITY
    )

    @field_validator("tokenizer")
    @classmethod
    def _tokenizer_starts_at_the_project(cls, value: str, info: ValidationInfo) -> str:
        if not value.strip():
            raise ValueError("valid: train, init_weights, or a folder with a tokenizer")
        return value if value in TOKENIZER_WORDS else absolute(value, start_of(info))

    @model_validator(mode="after")
    def _training_counts(self) -> Self:
        if self.tokenizer != "train" and self.tokenizer_training != TokenizerTraining():
            raise ValueError(f"tokenizer_training does nothing here: tokenizer = {self.tokenizer}; it goes with train")
        return self

    @field_validator("rules", mode="before")
    @classmethod
    def _settings_of_rules(cls, tables: Any, info: ValidationInfo) -> Any:
        """Give every table to the settings of its rule."""
        if not isinstance(tables, list | tuple):
            return tables
        return tuple(registry.settings(table, str(place), start_of(info)) for place, table in enumerate(tables))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.validation_fraction + self.test_fraction >= 0.9:
            raise ValueError(
                f"validation_fraction {self.validation_fraction} + test_fraction {self.test_fraction} leave too little "
                "to train on: keep their sum below 0.9"
            )
        if self.min_characters > self.max_characters:
            raise ValueError(f"min_characters {self.min_characters} is above max_characters {self.max_characters}")
        return self


class PrepareJob(Settings):
    """What the prepare stage is given: the corpus and what to do with it."""

    data: DataConfig = Field(default_factory=DataConfig, description="Which corpus.")
    prepare: PrepareConfig = Field(default_factory=PrepareConfig, description="From corpus to packed tokens.")

    def identity(self) -> dict[str, Any]:
        """Return what can change a result; a tokenizer that is brought along counts by its files, not by its place."""
        found = super().identity()
        if self.prepare.tokenizer not in TOKENIZER_WORDS:
            found["prepare"]["tokenizer"] = tokenizer_files.digest(Path(self.prepare.tokenizer))
        return found
