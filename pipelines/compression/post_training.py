"""Methods of kind "weight": a model compressed block by block, stored packed, reported beside its baselines."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from statistics import fmean

from models.compression import registry
from models.compression.base import Statistics
from pipelines.compression import baselines, bit_allocation, layer_selection, sensitivity, sequential, streaming, writer
from pipelines.compression.baselines import BaselineMethod, Contender
from pipelines.compression.report import (
    CalibrationFacts,
    Comparison,
    CompressionReport,
    PackedLayer,
    WeightErrors,
)
from pipelines.compression.run import CompressionRun
from pipelines.compression.sequential import Assignment
from pipelines.modelio import layout


def compress(run: CompressionRun) -> CompressionReport:
    """Compress the layers of the base model, calibrated on training sequences.

    Raises:
        ConfigError: the method does not fit a layer, which is named, or the base cannot be compressed again.
        NumericError: calibration met activations that are not finite.
    """
    config, method = run.config, registry.weight(run.config.method)
    run.refuse_rounded_inputs()
    names = sequential.targets(run.base, config.skip)
    dense = layout.loads_dense(run.base, config.parameters.model_dump(), embeddings=config.embeddings == "quantize")
    parameters = config.parameters
    if dense:
        matrices = writer.token_matrices(run.base, run.reader) if config.embeddings == "quantize" else []
        widths = {int(run.base.get_parameter(f"{name}.weight").shape[1]) for name in [*names, *matrices]}
        parameters = parameters.fitted(sorted(widths))
    needs = method.needs(parameters)
    if needs.gradients:
        sensitivity.record(run, names)
    selected = layer_selection.select(run, Assignment(method, parameters, names))
    allocated = bit_allocation.allocate(run, selected.assignment)
    assignment = allocated.assignment
    # Readers that unpack while loading apply one scheme to all layers, and none packs a layer that is no nn.Linear.
    private = (dense and bool(assignment.of_layer)) or bool(run.description.transposed)
    folder = writer.VariantWriter(
        run.base,
        run.reader,
        run.target,
        config=config,
        parameters=assignment.config,
        dense=dense and not private,
        private=private,
    )
    rows: dict[str, PackedLayer] = {}
    depth = run.base.config.num_hidden_layers
    for done, block in enumerate(sequential.compress_blocks(run, assignment, baselines=True), start=1):
        for name, layer in block.items():
            stored = folder.add(name, layer.packed, assignment.of_layer.get(name))
            rows[name] = layer.report(stored.stored_bits())
        run.progress(done, depth, "blocks")
    folder.close()
    comparison = _compare(run, allocated, rows)
    if needs.gradients:
        shutil.rmtree(run.fisher)
    return CompressionReport(
        method=config.method,
        parameters=assignment.config.model_dump(mode="json"),
        layout=folder.layout,
        loads_with=layout.loads_with(folder.layout),
        not_informative=method.not_informative,
        calibration=CalibrationFacts(sequences=len(run.tokens_NT) if needs.sequences else 0, seed=config.seed),
        totals=writer.totals(run, rows, embedding_bytes=folder.embedding_bytes),
        errors=_errors(rows),
        layers=rows,
        candidates=selected.candidates,
        partial=selected.partial,
        allocation=allocated.report,
        comparison=comparison,
    )


def _errors(rows: Mapping[str, PackedLayer]) -> WeightErrors:
    """Return the means over layers of the relative errors, those of baselines included."""
    names = next(iter(rows.values())).baselines
    return WeightErrors(
        weight=_mean(row.weight_error for row in rows.values()),
        output=_mean(row.output_error for row in rows.values()),
        baselines={name: fmean(row.baselines[name] for row in rows.values()) for name in names},
    )


def _mean(errors: Iterable[float | None]) -> float | None:
    measured = [error for error in errors if error is not None]
    return fmean(measured) if measured else None


# ---- the variant beside its baselines ---------------------------------------------------------------------------


def _compare(
    run: CompressionRun, allocated: bit_allocation.Allocated, rows: Mapping[str, PackedLayer]
) -> Comparison | None:
    """Compare the variant with its baselines; None where there is no text to compare on, or none is wanted."""
    documents = run.config.baseline_documents
    text = run.quick_eval(documents, "first") if documents else None
    if text is None:
        return None
    stored = sum(row.stored_bits for row in rows.values()) // 8
    others = dict(_baselines(run, allocated, rows, stored))

    def contenders() -> Iterator[Contender]:
        yield Contender("the base", streaming.base_nats(run, text, "the base"))
        own = run.config.method
        yield Contender(own, streaming.stored_nats(run, text, own, run.target), bytes=stored)
        for name, assignment in others.items():
            nats_D, bits = streaming.compressed_nats(run, text, name, assignment)
            yield Contender(name, nats_D, bytes=bits // 8)

    return baselines.compare(run, text, contenders(), count=1 + len(others))


def _baselines(
    run: CompressionRun, allocated: bit_allocation.Allocated, rows: Mapping[str, PackedLayer], stored: int
) -> Iterator[tuple[str, Assignment]]:
    """Yield integer grids of at least `stored` bytes, other allocations, and the naive choices of the method itself."""
    assignment, own = allocated.assignment, run.config.method
    names = list(rows)
    taken = {own}
    if (grid := baselines.nearest_grid([row.shape for row in rows.values()], stored)) is not None:
        for method in (registry.weight("rtn"), registry.weight("gptq")):
            if method.name not in taken:
                yield method.name, Assignment(method, method.Config.model_validate(grid), names)
        taken |= {"rtn", "gptq"}
    yield from allocated.baselines.items()
    for name in naive_choices(run, assignment, rows):
        if name not in taken:
            yield name, replace(assignment, method=BaselineMethod(assignment.method, name))


def naive_choices(run: CompressionRun, assignment: Assignment, rows: Mapping[str, PackedLayer]) -> list[str]:
    """Return the names of the method's own baselines, as it gives them for the first layer."""
    first, method = assignment.names[0], assignment.method
    if method.not_informative:
        return []
    if rows[first].output_error is not None:
        return sorted(rows[first].baselines)
    weight_OI = run.weight(first)
    return sorted(method.baselines(weight_OI, Statistics(), assignment.parameters(first)))
