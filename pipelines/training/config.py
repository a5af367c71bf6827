"""The `pretrain` section of a recipe: which model, which optimizer, which schedule, for how many steps.

Training is bound by steps, never by time, so that a run is the same run on a slower machine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from models.architectures.config import PRESETS, ArchitectureConfig, Family, Shape, preset
from models.objectives import registry as objectives
from models.optim import batch_split
from pipelines.core.settings import ELASTIC, NOT_IDENTITY, Settings, validated_at
from pipelines.training.mixture import MixtureConfig
from pipelines.training.monitors import registry as monitors
from pipelines.training.optimizer_config import LisaConfig, OptimizerConfig, refuse_idle


def _known_preset(name: str) -> str:
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return name


class ModelOverrides(Settings):
    """Single values of the preset to replace; what is not given stays as the preset has it."""

    width: int | None = Field(None, ge=8, description="Width of the residual stream.")
    layers: int | None = Field(None, ge=1, description="Number of layers.")
    heads: int | None = Field(None, ge=1, description="Attention heads; must divide the width into even parts.")
    kv_heads: int | None = Field(None, ge=1, description="Key and value heads (decoder); must divide `heads`.")
    head_width: int | None = Field(None, ge=2, description="Width of a head (decoder); none: the width over the heads.")
    ffn_width: int | None = Field(None, ge=8, description="Width of the gated feed-forward.")
    rope_theta: float | None = Field(None, gt=1.0, description="Base of the rotary position frequencies.")
    tie_embeddings: bool | None = Field(None, description="One matrix for token embedding and output.")
    norm_eps: float | None = Field(None, gt=0.0, description="Epsilon of the normalisations.")
    init_std: float | None = Field(None, gt=0.0, le=1.0, description="Standard deviation of initial weights.")
    local_window: int | None = Field(None, ge=2, description="Window of local attention in tokens (encoder).")
    global_every: int | None = Field(None, ge=1, description="Every n-th layer attends globally (encoder).")


class ScheduleConfig(Settings):
    """Learning rate over the steps: warm-up to the peak, then decay."""

    warmup: int = Field(
        50, ge=0, description="Steps of warm-up; the same steps at every batch are epochs in proportion to it."
    )
    warmup_share: float | None = Field(
        None, ge=0.0, lt=1.0, description="Warm-up as a share of the (phase's) steps, in place of `warmup`."
    )
    warmup_form: Literal["linear", "sqrt"] = Field("linear", description="Form of the warm-up.")
    decay: Literal["constant", "linear", "polynomial", "cosine", "wsd"] = Field(
        "cosine", description="Form of the decay; wsd stays at the peak and falls linearly at the end."
    )
    power: float = Field(1.0, gt=0.0, le=10.0, description="Exponent of the polynomial decay.")
    stable: float = Field(0.8, ge=0.0, lt=1.0, description="Share of the steps after warm-up at the peak (wsd).")
    floor: float = Field(
        0.0, ge=0.0, le=1.0, description="Learning rate after the last step over the peak; no step's own rate is 0."
    )

    @model_validator(mode="after")
    def _every_setting_counts(self) -> Self:
        if self.warmup_share is not None:
            refuse_idle(self, ("warmup",), "warmup_share takes its place")
        if self.warmup == 0 and not self.warmup_share:
            refuse_idle(self, ("warmup_form",), "it goes with warmup or warmup_share above 0")
        if self.decay != "polynomial":
            refuse_idle(self, ("power",), "it goes with decay = polynomial")
        if self.decay != "wsd":
            refuse_idle(self, ("stable",), "it goes with decay = wsd")
        if self.decay == "constant":
            refuse_idle(self, ("floor",), "it goes with any decay but constant")
        return self

    def warmup_steps(self, total: int) -> int:
        """Return the steps of warm-up of a schedule of `total` steps."""
        return self.warmup if self.warmup_share is None else round(self.warmup_share * total)


class BatchWarmup(Settings):
    """A batch that begins small and doubles until it has its size."""

    start: int = Field(ge=1, description="Sequences of the first step.")
    steps: int = Field(ge=1, description="Steps until the batch has its size; it doubles at even distances.")


class PhaseConfig(Settings):
    """A stretch of training with a batch, a sequence length and a learning-rate schedule of its own."""

    steps: int = Field(ge=1, description="Optimizer steps.")
    batch_size: int = Field(ge=1, description="Sequences of one optimizer step, over all ranks.")
    sequence_length: int | None = Field(
        None, ge=2, description="Tokens of a sequence, cut from the packed ones; none: as packed."
    )
    micro_batch_size: int | None = Field(
        None, ge=1, description="Sequences of one forward pass; none: the run's.", json_schema_extra=ELASTIC
    )
    lr: float | None = Field(
        None, gt=0.0, le=100.0, description="Peak learning rate; none: the optimizer's, with its scaling."
    )
    batch_warmup: BatchWarmup | None = Field(None, description="Begin with smaller batches; none: full from the start.")
    schedule: ScheduleConfig | None = Field(
        None, description="Learning rate over the steps of the phase, warm-up included; none: the run's."
    )
    mixture: MixtureConfig | None = Field(None, description="Shares of the sources; none: the run's.")
    objective_settings: dict[str, Any] = Field(
        default_factory=dict, description="What differs here from the run's settings of the objective."
    )

    @model_validator(mode="after")
    def _batch_doubles(self) -> Self:
        if (warm := self.batch_warmup) is None:
            return self
        ratio, rest = divmod(self.batch_size, warm.start)
        if rest or ratio < 2 or ratio & (ratio - 1):
            raise ValueError(
                f"batch_warmup.start = {warm.start}; batch_size = {self.batch_size} must be 2, 4, 8, ... times as large"
            )
        if warm.steps >= self.steps:
            raise ValueError(f"batch_warmup.steps = {warm.steps}; the phase has {self.steps} steps")
        return self


class CheckpointConfig(Settings):
    """How often state is saved; nothing here changes a result."""

    every: int = Field(
        50,
        ge=1,
        description="Steps between checkpoints; with faults_per_day, until the first one was measured.",
        json_schema_extra=NOT_IDENTITY,
    )
    faults_per_day: float | None = Field(
        None,
        gt=0,
        description="How often the ranks of this training, all together, are expected to die. Checkpoints then come at "
        "Young's and Daly's interval, sqrt(2 x measured seconds of a save x seconds between faults); none: at `every`.",
        json_schema_extra=NOT_IDENTITY,
    )
    keep: int = Field(
        2,
        ge=2,
        le=1000,
        description="Checkpoints kept; at least 2, because the newest may be the one that a crash cut short.",
        json_schema_extra=NOT_IDENTITY,
    )


class ProfileConfig(Settings):
    """A window of steps that rank 0 traces with torch's profiler."""

    start: int = Field(10, ge=1, description="Step before which it begins; the first ones are slower than the others.")
    steps: int = Field(3, ge=1, le=100, description="Steps traced; some megabytes each.")


class PretrainConfig(Settings):
    """The model and its training."""

    family: Family = Field("decoder", description="decoder: causal LM (Llama); encoder: masked LM (ModernBERT).")
    preset: Annotated[str, AfterValidator(_known_preset)] = Field(
        "4m", description="Model size: parameters at a vocabulary of 4,096 tokens."
    )
    model: ModelOverrides = Field(default_factory=ModelOverrides, description="Values of the preset to replace.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="The update rule.")
    lisa: LisaConfig = Field(default_factory=LisaConfig, description="Train a few layers at a time.")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="Learning rate over the steps.")
    objective: str = Field(
        "",
        description="What the model is asked to predict: a module of models/objectives; empty: causal for a decoder, "
        "masked for an encoder.",
    )
    objective_settings: dict[str, Any] = Field(
        default_factory=dict, description="Settings of the objective (masked: probability, mask, random)."
    )
    document_mask: bool = Field(True, description="Keep attention inside of a document, however it was packed.")
    engine: Literal["deepspeed", "plain"] = Field("deepspeed", description="deepspeed (Accelerate) or plain PyTorch.")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="ZeRO stage: what DeepSpeed shards over the ranks.", json_schema_extra=ELASTIC
    )
    world_size: int = Field(2, ge=1, le=65536, description="Ranks: one process each.", json_schema_extra=ELASTIC)
    threads: int = Field(
        1,
        ge=1,
        le=1024,
        description="CPU threads of a rank; another number rounds in another order.",
        json_schema_extra=ELASTIC,
    )
    offload: bool = Field(
        False, description="Keep masters and moments in the CPU's memory (ZeRO 1 to 3).", json_schema_extra=ELASTIC
    )
    steps: int = Field(400, ge=1, description="Optimizer steps; with phases their sum.")
    batch_size: int = Field(
        8, ge=1, description="Sequences of one optimizer step, over all ranks; with phases the largest of theirs."
    )
    phases: tuple[PhaseConfig, ...] = Field(
        (), description="Stretches with a batch, sequence length and schedule of their own; empty: one for all steps."
    )
    mixture: MixtureConfig | None = Field(
        None, description="Shares of the sources of the corpus; none: every sequence once in each epoch."
    )
    micro_batch_size: int = Field(
        4, ge=1, description="Sequences of one forward pass on one rank.", json_schema_extra=ELASTIC
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Arithmetic; bf16 keeps fp32 master weights.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of weights, data order, masks and layer draws.")
    validate_every: int = Field(50, ge=1, description="Steps between validations; one follows the last step.")
    validation_sequences: int = Field(64, ge=1, description="Validation sequences used each time, at most.")
    samples: bool = Field(
        True,
        description="Write down after each validation what the model makes of a validation text, in samples.jsonl.",
        json_schema_extra=NOT_IDENTITY,
    )
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Saving state.")
    compile: bool = Field(
        False,
        description="Compile the model with torch.compile; needs a C++ compiler, on a GPU Triton.",
        json_schema_extra=ELASTIC,
    )
    loss_chunk: int | None = Field(
        None,
        ge=1,
        description="Targets whose logits are held at a time, and computed again in the backward pass; none: all of "
        "a micro batch, once.",
        json_schema_extra=ELASTIC,
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="What layers compute again in the backward pass in place of keeping it: nothing; all but matrix "
        "products and attention; all but their inputs.",
        json_schema_extra=ELASTIC,
    )
    max_skipped: int = Field(3, ge=0, description="Non-finite steps in a row that are skipped before giving up.")
    monitors: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="What watches the loss and goes back to the last good checkpoint: a module of "
        "pipelines/training/monitors and its settings; none: nothing does (loss_spikes: factor, window, "
        "max_rollbacks).",
    )
    log_every: int = Field(1, ge=1, description="Steps between lines of metrics.", json_schema_extra=NOT_IDENTITY)
    profile: ProfileConfig | None = Field(
        None, description="Steps that are traced operation by operation; none: none.", json_schema_extra=NOT_IDENTITY
    )

    @property
    def ranks_and_cores(self) -> tuple[int, int]:
        """Processes that train together, and the cores that they can use."""
        return self.world_size, self.world_size * self.threads

    @property
    def accumulation(self) -> int:
        """Forward passes of one rank for one optimizer step."""
        return self.batch_size // (self.world_size * self.micro_batch_size)

    @property
    def shape(self) -> Shape:
        """The model's shape: the preset with the overrides applied."""
        return preset(self.family, self.preset, self.model.model_dump(exclude_none=True))

    def architecture(self, index: dict[str, Any]) -> ArchitectureConfig:
        """Return the architecture for the tokenizer and the sequences that `index.json` of prepare describes."""
        return ArchitectureConfig(
            **self.shape.model_dump(),
            vocab_size=index["vocab_size"],
            max_positions=index["sequence_length"],
            bos_id=index["bos_id"],
            eos_id=index["eos_id"],
            pad_id=index["pad_id"],
            mask_id=index["mask_id"],
        )

    @model_validator(mode="before")
    @classmethod
    def _phases_add_up(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not (phases := raw.get("phases")):
            return raw
        known = [PhaseConfig.model_validate(phase) for phase in phases]
        for name, value in {
            "steps": sum(p.steps for p in known),
            "batch_size": max(p.batch_size for p in known),
        }.items():
            if raw.get(name, value) != value:
                raise ValueError(f"{name} = {raw[name]}, the phases make it {value}: set it in `phases` only")
            raw = {**raw, name: value}
        return raw

    @field_validator("objective")
    @classmethod
    def _objective_fits_the_family(cls, value: str, info: ValidationInfo) -> str:
        if (family := info.data.get("family")) is None:
            return value
        name = value or objectives.default(family)
        if family not in (fitting := objectives.get(name).families):
            raise ValueError(f"{name} does not fit family = {family}; it fits: {', '.join(sorted(fitting))}")
        return name

    @field_validator("objective_settings")
    @classmethod
    def _objective_has_these_settings(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if not (name := info.data.get("objective")):
            return value
        return validated_at(objectives.get(name).Config, value).model_dump(mode="json")

    @model_validator(mode="after")
    def _phases_have_settings_of_the_objective(self) -> Self:
        for number in range(len(self.phases)):
            self.objective_settings_of(number)
        return self

    def objective_settings_of(self, phase: int) -> dict[str, Any]:
        """Return the settings of the objective in a phase."""
        own = self.phases[phase].objective_settings if self.phases else {}
        kind = objectives.get(self.objective).Config
        place = ("phases", str(phase), "objective_settings")
        return validated_at(kind, {**self.objective_settings, **own}, *place).model_dump(mode="json")

    @field_validator("monitors")
    @classmethod
    def _monitors_are_known(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {
            name: validated_at(monitors.get(name).Config, table, name).model_dump(mode="json")
            for name, table in sorted(value.items())
        }

    @model_validator(mode="after")
    def _model_can_be_built(self) -> Self:
        _ = self.shape
        return self

    @model_validator(mode="after")
    def _a_save_is_measured(self) -> Self:
        if self.checkpoint.faults_per_day is not None and self.checkpoint.every >= self.steps:
            raise ValueError(
                f"checkpoint.faults_per_day does nothing here: the first save, at step checkpoint.every = "
                f"{self.checkpoint.every}, is what it measures, and there are {self.steps} steps"
            )
        return self

    @model_validator(mode="after")
    def _batch_splits(self) -> Self:
        batch_split.refuse_uneven("batch_size", self.batch_size, self.world_size, self.micro_batch_size)
        for number, phase in enumerate(self.phases):
            micro = phase.micro_batch_size or self.micro_batch_size
            batch_split.refuse_uneven(f"phases.{number}.batch_size", phase.batch_size, self.world_size, micro)
            if phase.batch_warmup is not None:
                batch_split.refuse_uneven(
                    f"phases.{number}.batch_warmup.start", phase.batch_warmup.start, self.world_size, micro
                )
        return self

    @model_validator(mode="after")
    def _lisa_fits_the_depth(self) -> Self:
        depth = self.shape.layers
        if self.lisa.enabled and self.lisa.layers > depth:
            raise ValueError(f"lisa.layers = {self.lisa.layers}; the model has {depth} layers, valid: 1 to {depth}")
        if self.lisa.measured and len(self.lisa.measured) != depth:
            raise ValueError(f"lisa.measured has {len(self.lisa.measured)} numbers; the model has {depth} layers")
        return self

    @model_validator(mode="after")
    def _warmup_fits_the_steps(self) -> Self:
        stretches = [("", self.steps, self.schedule)] if not self.phases else []
        for number, phase in enumerate(self.phases):
            stretches.append((f"phases.{number}.", phase.steps, phase.schedule or self.schedule))
        for where, steps, chosen in stretches:
            if (warmup := chosen.warmup_steps(steps)) >= steps:
                raise ValueError(f"{where}schedule.warmup = {warmup}; of {steps} steps, valid: 0 to {steps - 1}")
        return self

    @model_validator(mode="after")
    def _every_setting_counts(self) -> Self:
        others = ("local_window", "global_every") if self.family == "decoder" else ("head_width",)
        for name in others:
            value = getattr(self.model, name)
            if value not in (None, Shape.model_fields[name].default):
                raise ValueError(f"model.{name} = {value} does nothing here: a {self.family} has none")
        if not self.phases:
            return self
        idle = {
            "schedule": (self.schedule != ScheduleConfig(), all(p.schedule is not None for p in self.phases)),
            "optimizer.lr": (self.optimizer.lr is not None, all(p.lr is not None for p in self.phases)),
            "mixture": (self.mixture is not None, all(p.mixture is not None for p in self.phases)),
            "optimizer.lr_scaling": (self.optimizer.lr_scaling is not None, all(p.lr is not None for p in self.phases)),
        }
        for name, (given, replaced) in idle.items():
            if given and replaced:
                raise ValueError(f"{name} does nothing here: every phase has its own {name.removeprefix('optimizer.')}")
        return self

    @model_validator(mode="after")
    def _plain_is_one_process(self) -> Self:
        batch_split.refuse_spread_plain(self.engine, self.world_size, self.zero_stage)
        return self

    @model_validator(mode="after")
    def _profile_is_within_the_steps(self) -> Self:
        if self.profile is not None and self.profile.start + self.profile.steps > self.steps:
            last = self.steps - self.profile.steps
            raise ValueError(f"profile.start = {self.profile.start}; of {self.steps} steps, valid: 1 to {last}")
        return self

    @model_validator(mode="after")
    def _compiled_models_keep_what_the_compiler_chooses(self) -> Self:
        if self.compile and self.activation_checkpointing != "none":
            raise ValueError(
                f"compile = true with activation_checkpointing = {self.activation_checkpointing}: the compiler decides "
                "itself what is computed again; valid: one of the two"
            )
        return self

    @model_validator(mode="after")
    def _compiled_models_do_not_freeze_layers(self) -> Self:
        if self.compile and self.lisa.enabled:
            raise ValueError(
                "compile = true with lisa.enabled = true: each draw of layers would compile the model anew; valid: "
                "one of the two"
            )
        return self

    @model_validator(mode="after")
    def _offload_is_sharded(self) -> Self:
        if self.offload and self.zero_stage == 0:
            raise ValueError("offload = true with zero_stage = 0: only sharded state can be offloaded; valid: 1, 2, 3")
        return self

    @model_validator(mode="after")
    def _half_precision_is_sharded(self) -> Self:
        if self.engine == "deepspeed" and self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "precision = bf16 with zero_stage = 0: DeepSpeed keeps no fp32 masters there; valid: 1, 2, 3"
            )
        return self
