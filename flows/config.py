"""The configuration of a run: a frozen tree of stage settings, read from a recipe and dotted overrides."""

from __future__ import annotations

import os
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from flows import executors
from pipelines.compression.config import CompressConfig
from pipelines.core.compute import ComputeConfig
from pipelines.core.settings import NOT_IDENTITY, PATH, Settings, known_keys
from pipelines.core.stage import BASES
from pipelines.core.store import SCHEME
from pipelines.data.config import DataConfig, PrepareConfig
from pipelines.evaluation import probe
from pipelines.evaluation.config import EvaluateConfig
from pipelines.registry.config import BaseConfig, PromoteConfig
from pipelines.stages import STAGES
from pipelines.tracking.config import TrackingConfig
from pipelines.training.config import PretrainConfig
from pipelines.training.optimizer_config import OptimizerConfig


class StoreConfig(Settings):
    """Where artifacts live."""

    path: str = Field(
        default_factory=lambda: os.environ.get("INGOT_STORE", ".ingot"),
        min_length=1,
        description="Folder of the store, relative to the project; or s3://BUCKET/PREFIX. Default: $INGOT_STORE, else "
        ".ingot.",
        json_schema_extra=NOT_IDENTITY | PATH,
    )

    @field_validator("path")
    @classmethod
    def _is_a_folder_or_on_s3(cls, value: str) -> str:
        if "://" in value and not value.startswith(SCHEME):
            raise ValueError(f"{value!r} is neither a folder nor s3://BUCKET/PREFIX")
        return value


class TrainingBaseline(Settings):
    """The same training with another optimizer: measured beside the model at equal tokens, never a candidate."""

    name: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_-]*$",
        description="Name of its nodes: `pretrain.NAME` trains it, `compare.NAME` measures it; empty: the optimizer's.",
        json_schema_extra=NOT_IDENTITY,
    )
    optimizer: OptimizerConfig = Field(description="What replaces `pretrain.optimizer` as a whole.")

    @model_validator(mode="after")
    def _name_itself(self) -> TrainingBaseline:
        if not self.name:
            object.__setattr__(self, "name", self.optimizer.name)
        return self

    def of(self, config: PretrainConfig) -> PretrainConfig:
        """Return a training with this optimizer."""
        return config.model_copy(update={"optimizer": self.optimizer})


class RunConfig(Settings):
    """Everything that a run needs to know."""

    data: DataConfig = Field(default_factory=DataConfig, description="Which corpus, at which revision.")
    base: BaseConfig = Field(
        default_factory=BaseConfig, description="A model to start from, instead of random weights."
    )
    prepare: PrepareConfig = Field(default_factory=PrepareConfig, description="From corpus to packed tokens.")
    pretrain: PretrainConfig = Field(
        default_factory=PretrainConfig,
        description="The model and its training; with `base.from` and without this section, nothing is trained.",
    )
    baselines: list[TrainingBaseline] = Field(
        default_factory=list, description="Other optimizers to train the same model with, at equal tokens."
    )
    compress: list[CompressConfig] = Field(default_factory=list, description="The variants to derive from the model.")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="What to measure.")
    promote: PromoteConfig = Field(default_factory=PromoteConfig, description="The gate and the registry.")
    compute: ComputeConfig = Field(default_factory=ComputeConfig, description="Devices, time-outs, retries.")
    store: StoreConfig = Field(default_factory=StoreConfig, description="Where artifacts live.")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="MLflow.")

    @field_validator("compress", mode="before")
    @classmethod
    def _collapse_equal_children(cls, value: Any) -> Any:
        """Overrides such as `compress.method=gptq` set every variant; variants that became equal are one."""
        return [c for i, c in enumerate(value) if c not in value[:i]] if isinstance(value, list) else value

    @field_validator("compute")
    @classmethod
    def _executor_is_there(cls, value: ComputeConfig) -> ComputeConfig:
        if value.executor not in executors.names():
            raise ValueError(f"executor = {value.executor!r}; there is {', '.join(executors.names())}")
        for stage in value.stages:
            if stage not in STAGES:
                raise ValueError(f"stages.{stage}: no stage{known_keys(stage, list(STAGES))}")
        return value

    @property
    def trains(self) -> bool:
        """Whether the run pretrains a model: it begins at random weights, or its recipe has a section `pretrain`."""
        return not self.base.from_ or "pretrain" in self.model_fields_set

    @property
    def base_name(self) -> str:
        """What the base model is called, as its node is."""
        return "pretrain" if self.trains else "base"

    @model_serializer(mode="wrap")
    def _without_a_training_that_is_none(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        table: dict[str, Any] = whole(self)
        return table if self.trains else {name: section for name, section in table.items() if name != "pretrain"}

    @model_validator(mode="before")
    @classmethod
    def _what_is_not_trained_keeps_its_tokenizer(cls, value: Any) -> Any:
        """Without training there is one right tokenizer: that of the model."""
        if not isinstance(value, dict) or "pretrain" in value:
            return value
        base, prepare = value.get("base"), value.get("prepare") or {}
        if not (isinstance(base, dict) and base.get("from") and isinstance(prepare, dict)):
            return value
        return value | {"prepare": {"tokenizer": "init_weights"} | prepare}

    @model_validator(mode="after")
    def _ranks_fill_the_nodes(self) -> RunConfig:
        parts: list[tuple[str, Settings]] = [
            ("pretrain", self.pretrain),
            *(("compress", each) for each in self.compress),
        ]
        for stage, config in parts:
            ranks, cores = config.ranks_and_cores
            nodes = self.compute.at(stage, ranks=ranks, cores=cores).node_count
            if ranks % nodes:
                raise ValueError(
                    f"compute.nodes = {nodes}: {ranks} ranks of {stage} do not spread evenly over them; "
                    f"a multiple of {nodes} does, or compute.stages.{stage}.nodes"
                )
        return self

    @model_validator(mode="after")
    def _mixtures_have_sources(self) -> RunConfig:
        mixes = any(each is not None for each in (self.pretrain.mixture, *(p.mixture for p in self.pretrain.phases)))
        if mixes and self.prepare.pack_by != "source":
            raise ValueError('pretrain.mixture chooses among sources; it needs prepare.pack_by = "source"')
        return self

    @model_validator(mode="after")
    def _tokenizer_has_a_model(self) -> RunConfig:
        if self.prepare.tokenizer == "init_weights" and not self.base.from_:
            raise ValueError("prepare.tokenizer = 'init_weights' takes the tokenizer of base.from, which is not set")
        if self.prepare.tokenizer == "train" and not self.trains:
            raise ValueError(
                "prepare.tokenizer = 'train': the model of base.from knows its own tokens only, and nothing is trained "
                "here; leave the key out, or add a section [pretrain] that goes on training it"
            )
        return self

    @model_validator(mode="after")
    def _probes_fit_the_family(self) -> RunConfig:
        if not self.trains:
            return self  # the plan asks when it knows the model
        for name, settings in self.evaluate.probes.items():
            if settings.enabled and (reason := probe.get(name).misfit(settings, self.pretrain.family)):
                raise ValueError(f"evaluate.probes.{name}: {reason}")
        return self

    @model_validator(mode="after")
    def _baselines_differ(self) -> RunConfig:
        if self.baselines and not self.trains:
            raise ValueError("baselines: nothing is trained here, so there is nothing to train with other optimizers")
        names = [baseline.name for baseline in self.baselines]
        for baseline in self.baselines:
            if names.count(baseline.name) > 1:
                raise ValueError(f"two baselines are called {baseline.name!r}; give each a `name` of its own")
            if baseline.optimizer == self.pretrain.optimizer:
                raise ValueError(
                    f"the baseline {baseline.name!r} has the optimizer of the model itself; without any: baselines=[]"
                )
        return self

    @model_validator(mode="after")
    def _children_have_names_of_their_own(self) -> RunConfig:
        names = [variant.name for variant in self.compress]
        for name in names:
            if names.count(name) > 1 or name in BASES:
                raise ValueError(f"two models are called {name!r}; give each variant a `name` of its own")
        for position, variant in enumerate(self.compress):
            if variant.from_ and variant.from_ not in names[:position]:
                raise ValueError(
                    f"compress.{position}.from = {variant.from_!r} is no variant above it: {names[:position]}"
                )
        if self.promote.candidate not in {self.base_name, "smallest", *names}:
            known = ", ".join([self.base_name, "smallest", *names])
            raise ValueError(f"promote.candidate is {self.promote.candidate!r}; this recipe has {known}")
        return self
