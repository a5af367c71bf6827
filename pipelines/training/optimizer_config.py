"""The `optimizer` and `lisa` sections of a training: the update rule, and which layers it is applied to."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipelines.core.settings import ELASTIC, Settings

_DEFAULT_LR = {"lamb": 2e-2, "adamw": 3e-3, "lars": 2e-2}
_DEFAULT_EPS = {"lamb": 1e-6, "adamw": 1e-8, "lars": 1e-6}


def refuse_idle(section: Settings, names: tuple[str, ...], used_by: str) -> None:
    """Refuse settings that differ from their defaults and would do nothing.

    Raises:
        ValueError: naming the setting, and what would make it count.
    """
    for name in names:
        field = type(section).model_fields[name]
        if (value := getattr(section, name)) != field.get_default(call_default_factory=True):
            shown = str(value).lower() if isinstance(value, bool) else value
            raise ValueError(f"{name} = {shown} does nothing here: {used_by}")


class LrScaling(Settings):
    """How the learning rate follows the batch."""

    base_batch: int = Field(ge=1, description="Sequences a step at which `lr` is the peak.")
    rule: Literal["sqrt", "linear"] = Field("sqrt", description="Form of the growth; LAMB's paper takes the root.")


class OptimizerConfig(Settings):
    """The update rule. Norm gains and biases are neither decayed nor adapted, but by some variants of lamb."""

    name: Literal["lamb", "adamw", "lars"] = Field("lamb", description="Update rule.")
    lr: float | None = Field(
        None, gt=0.0, le=100.0, description="Peak learning rate; none: 0.02 for lamb and lars, 0.003 for adamw."
    )
    lr_scaling: LrScaling | None = Field(None, description="Let the rate follow the batch; none: `lr` at every batch.")
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = Field(
        (0.9, 0.95), description="Decay of the first and second moment; lars uses the first as its momentum."
    )
    eps: float | None = Field(None, gt=0.0, le=1.0, description="Denominator guard; none: the rule's own default.")
    weight_decay: float = Field(0.01, ge=0.0, le=10.0, description="Decoupled weight decay of matrices.")
    clip: float | None = Field(1.0, gt=0.0, description="Bound of the global gradient norm; none: no clipping.")
    variant: Literal["paper", "nvlamb", "apex", "deepspeed", "addons"] = Field(
        "paper",
        description="Whose lamb: how moments are corrected, what is bounded, what is adapted, eps where it is none.",
    )
    bias_correction: bool = Field(True, description="Correct the moments for their start at zero (lamb).")
    clamp: tuple[float, float] | None = Field(
        None, description="Bounds of the weight norm in the trust ratio (lamb, lars); none: unbounded."
    )
    compiled: bool = Field(
        False,
        description="Measure the trust ratios in one compiled pass over memory (lamb, lars); needs a C++ compiler, on "
        "a GPU Triton.",
        json_schema_extra=ELASTIC,
    )

    @property
    def peak_lr(self) -> float:
        """The learning rate at the top of the schedule."""
        return _DEFAULT_LR[self.name] if self.lr is None else self.lr

    @property
    def epsilon(self) -> float:
        """The denominator guard in use."""
        return _DEFAULT_EPS[self.name] if self.eps is None else self.eps

    @model_validator(mode="after")
    def _every_setting_counts(self) -> Self:
        if self.name != "lamb":
            refuse_idle(self, ("bias_correction", "variant"), "it goes with name = lamb")
        if self.variant != "paper":
            refuse_idle(self, ("bias_correction", "clamp"), f"variant = {self.variant} says it")
        if self.name == "adamw":
            refuse_idle(self, ("clamp", "compiled"), "it goes with name = lamb or lars")
        if self.name == "lars":
            refuse_idle(self, ("eps",), "it goes with name = lamb or adamw")
            if self.betas[1] != type(self).model_fields["betas"].default[1]:
                raise ValueError(f"betas.1 = {self.betas[1]} does nothing here: lars has the first moment only")
        return self

    @model_validator(mode="after")
    def _clamp_is_an_interval(self) -> Self:
        if self.clamp is not None and not 0.0 <= self.clamp[0] < self.clamp[1]:
            raise ValueError(f"clamp = {list(self.clamp)} is no interval; valid: 0 <= low < high")
        return self


class LisaConfig(Settings):
    """Layerwise importance sampling (arXiv 2403.17919): train a few layers at a time, redrawn at intervals."""

    enabled: bool = Field(
        False,
        description="Switch LISA on, with any optimizer; any other setting of it does so too, unless this is false.",
    )
    layers: int = Field(2, ge=1, description="Layers that train at a time; embeddings, final norm and head always do.")
    interval: int = Field(20, ge=1, description="Steps between draws.")
    weights: Literal["uniform", "norm", "measured"] = Field(
        "uniform",
        description="Chance of a layer: equal for all; in proportion to the norm of its weights at the draw; or as "
        "measured on another run.",
    )
    measured: tuple[Annotated[float, Field(ge=0.0)], ...] = Field(
        (),
        description="One weight a layer for weights = measured: `layer_importance` of another run's training.json.",
    )

    @model_validator(mode="before")
    @classmethod
    def _any_setting_switches_it_on(cls, raw: Any) -> Any:
        return {"enabled": True, **raw} if isinstance(raw, dict) and raw else raw

    @model_validator(mode="after")
    def _measured_where_asked(self) -> Self:
        if (self.weights == "measured") != bool(self.measured):
            raise ValueError(
                f"weights = {self.weights} with {len(self.measured)} measured numbers; `measured` goes with "
                "weights = measured, and with nothing else"
            )
        if self.measured and sum(weight > 0 for weight in self.measured) < self.layers:
            raise ValueError(f"measured = {list(self.measured)} lets fewer than {self.layers} layers be drawn")
        return self
