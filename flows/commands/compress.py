"""compress: one model in, one variant and its verdict out; the one-line form of a recipe without training.

The corpus is the project's. With `--data`, or where there is no project, it is taken into a project of its own below
the store; without either it is the language reference that comes with Python, which every machine has.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit

from flows import console, graph, recipe, run_plan
from flows.commands import lookup, new
from flows.commands import run as run_command
from flows.run_plan import RunPlan
from flows.run_record import REPORT, Runs
from pipelines.core import fingerprint, project, quantity
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.core.store import SCHEME, open_store
from pipelines.data.config import DataConfig, FieldNames
from pipelines.registry import gate, initial_weights
from pipelines.registry.config import PromoteConfig
from pipelines.registry.evidence import read as evidence_of
from pipelines.tracking.config import TrackingConfig

_INHERITED = ("data", "tracking", "compute")
"""Sections of a project's own recipe that hold for its models, however they are compressed."""
_OF_THE_TOKENIZER = ("tokenizer", "tokenizer_training", "vocab_size", "sequence_length")
_LONGEST = 512
"""Tokens of a sequence at most, unless something else is said."""
_DOCUMENTS = 200
"""Held-out documents that are measured at most, unless something else is said."""
_PIECE = 4000
"""Characters of a document of the language reference at most."""
_NAMED = {"base": "the model as it came"}


@dataclass(frozen=True)
class _Place:
    """Where a one-line run takes its text from, and where it keeps what it makes."""

    project: Path
    store: str
    table: Mapping[str, Any]
    """What the recipe says of the corpus."""
    said: str
    """The corpus, in words."""


def compress(
    model: str,
    method: str,
    bits: str | None,
    overrides: Sequence[str],
    *,
    data: str | None,
    out: str | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Compress one model, measure it beside the original, and write it to a folder.

    Args:
        model: a folder, or any name that `lookup` knows.
        method: of compression.
        bits: of its settings, the one that most have; None for its default.
        overrides: settings over the recipe that is made.
        data: corpus to calibrate and measure on; None for the project's, else Python's language reference.
        out: folder to create; None for one that is called after model and variant.
        dry_run: only say what would be done.
        as_json: print JSON.

    Returns:
        The exit code.

    Raises:
        ConfigError: there is no such model, method or corpus, they do not go together, or the folder exists.
    """
    run_command.quieten()
    with contextlib.ExitStack() as stack:
        source = _source(model)
        place = stack.enter_context(_place(data, dry_run=dry_run))
        table = _table(source, place, method, bits)
        for override in overrides:
            recipe.apply(table, override)
        config = recipe.validated(table, place.project)
        if len(config.compress) != 1:
            raise ConfigError(
                "`ingot compress` makes one variant", hint="a recipe makes several: docs/guides/own-model.md"
            )
        name = f"{_name_of(source)}-{config.compress[0].name}"
        destination = Path(out or name).expanduser()
        if destination.exists():
            raise ConfigError(f"{destination} exists", hint="name another folder with --out")
        text = tomlkit.dumps(table)
        if not as_json:
            console.say(f"{model}: {config.compress[0].name}, calibrated and measured on {place.said}")
        made = run_plan.make(_written(text, name, place, stack, dry_run=dry_run), project=place.project)
        if dry_run:
            if not as_json:
                print(f"# the recipe of this line\n{text}")
            more = {"recipe": text, "corpus": place.said, "folder": str(destination)}
            return run_command.show_plan(made, as_json=as_json, more=more)
        run_id = run_command.execute(made, wait_s=None, as_json=as_json)
        _finish(made, destination, place, run_id, as_json=as_json)
    return 0


def _source(model: str) -> str:
    """Return what `base.from` is to say."""
    folder = Path(model).expanduser()
    if folder.is_dir() and ((folder / "config.json").is_file() or project.find_any() is None):
        initial_weights.model_folder(folder)
        return str(folder.resolve())
    if (named := lookup.registered_name(model)) is not None:
        return named
    found = lookup.find_model(model)
    return str(found.path)


def _name_of(source: str) -> str:
    if (parts := initial_weights.REGISTERED.fullmatch(source)) is not None:
        return new.model_name(parts["name"])
    folder = Path(source)
    if (manifest := folder / "manifest.json").is_file():
        node: str = json.loads(manifest.read_bytes())["node"]
        return new.model_name(node.removeprefix("compress."))
    return new.model_name(folder.parent.name if folder.name == lookup.MODEL_FOLDER else folder.name)


# ---- where ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _place(data: str | None, *, dry_run: bool) -> Iterator[_Place]:
    """Give the corpus and the store; a dry run takes a corpus into a folder that is gone afterwards."""
    around = project.find_any()
    store = _store_address(around)
    inherited = {} if around is None else _of_project(around)
    if data is None and around is not None:
        settings = DataConfig.model_validate(inherited.get("data", {}))
        said = f"the corpus of this project, {around / settings.path}"
        if (around / settings.tracked_by).is_file():
            yield _Place(around, store, inherited, said)
            return
    kept = {key: value for key, value in inherited.items() if key not in {"data", "prepare"}}
    with tempfile.TemporaryDirectory() if dry_run else contextlib.nullcontext(str(_root(store, around))) as root:
        where = "python" if data is None else data if "://" in data else str(Path(data).expanduser().resolve())
        folder = Path(root) / "corpora" / fingerprint.digest(where)[:12]
        documents = _corpus(folder, data)
        share = new.share(documents)
        said = f"{data} ({documents:,} documents)"
        if data is None:
            said = (
                f"Python's language reference ({documents:,} documents), for want of a corpus: --data PATH takes yours"
            )
        yield _Place(folder, store, kept | {"prepare": {"validation_fraction": share, "test_fraction": share}}, said)


def _store_address(around: Path | None) -> str:
    """Return where everything is kept: $INGOT_STORE, the project's store, or a folder for caches of this user's."""
    named = os.environ.get("INGOT_STORE")
    if around is not None or (named and (named.startswith(SCHEME) or Path(named).is_absolute())):
        return lookup.store().address
    if named:
        return str(Path(named).resolve())
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return str(caches / "ingot" / "store")


def _root(address: str, around: Path | None) -> Path:
    return open_store(address, around or Path.cwd()).root


def _of_project(root: Path) -> dict[str, Any]:
    """Return what the project's own recipe says of data, tracking and machines: held-out text stays held out."""
    table = recipe.load(project.settings(root).recipe, root)
    kept = {key: table[key] for key in _INHERITED if key in table}
    prepare = {key: value for key, value in table.get("prepare", {}).items() if key not in _OF_THE_TOKENIZER}
    return kept | ({"prepare": prepare} if prepare else {})


def _corpus(folder: Path, data: str | None) -> int:
    """Take a corpus into a project of its own, anew where it was taken before; return the number of documents."""
    shutil.rmtree(folder / "data", ignore_errors=True)
    for relative, text in new.FILES.items():
        new.write(folder / relative, text)
    new.write(folder / ".dvc" / "config", f"{new.FILES['.dvc/config']}    no_scm = true\n")
    with tempfile.TemporaryDirectory() as scratch:
        if data is None:
            _language_reference(Path(scratch))
        local = Path(scratch) if data is None else None if "://" in data else Path(data).expanduser().resolve()
        if local is not None and not local.exists():
            raise ConfigError(f"--data {data}: {local} does not exist", hint="give a folder, a file or a URL")
        documents, refused, said = new.take(folder, local, data or "", FieldNames())
    if data is not None:
        console.say("\n".join(said))
    if refused:
        raise ConfigError(f"--data {data}: {'; '.join(refused)}", hint="`ingot data check` in a project tells more")
    new.write(folder / project.MARKER, new.MARKER.format(name="smoke"))
    return documents


def _language_reference(folder: Path) -> None:
    """Write Python's language reference as texts of a few paragraphs each."""
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        piece, number = "", 0
        for paragraph in [*text.split("\n\n"), ""]:
            if piece and (not paragraph or len(piece) + len(paragraph) > _PIECE):
                new.write(folder / f"{topic}-{number}.txt", piece)
                piece, number = "", number + 1
            piece += f"{paragraph}\n\n" if paragraph else ""


# ---- what -----------------------------------------------------------------------------------------------------------


def _table(source: str, place: _Place, method: str, bits: str | None) -> dict[str, Any]:
    """Return the recipe of the line, as a table."""
    variant: dict[str, Any] = {"method": method} | ({} if bits is None else {"bits": _number(bits)})
    table = {
        "base": {"from": source},
        "prepare": {"sequence_length": _length(source, place)},
        "compress": [variant],
        "evaluate": {
            "max_documents": _DOCUMENTS,
            "baselines": [],
            "tasks": {"names": []},
            "probes": {"relative": {"enabled": False}, "latency": {"enabled": False}},
        },
        "promote": {"enabled": False},
        "store": {"path": place.store},
    }
    return recipe.merge(place.table, table)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _length(source: str, place: _Place) -> int:
    """Return how many tokens a sequence gets: as many as the model has positions, and not more than `_LONGEST`."""
    from pipelines.modelio import description

    tracking = TrackingConfig.model_validate(place.table.get("tracking", {}))
    root = _root(place.store, place.project)
    config = initial_weights.resolve(source, tracking, root, place.project).config
    known = description.of_config(config).positions or config.get("max_position_embeddings") or _LONGEST
    return min(_LONGEST, int(known))


def _written(text: str, name: str, place: _Place, stack: contextlib.ExitStack, *, dry_run: bool) -> str:
    """Write the recipe where the plan reads it, and return its path."""
    root = Path(stack.enter_context(tempfile.TemporaryDirectory())) if dry_run else _root(place.store, place.project)
    path = root / "recipes" / f"{name}.toml"
    new.write(path, f"# What `ingot compress` ran.\n{text}")
    return str(path)


# ---- the end --------------------------------------------------------------------------------------------------------


def _finish(made: RunPlan, destination: Path, place: _Place, run_id: str | None, *, as_json: bool) -> None:
    """Write the folder, and print the table and the verdict of the gate's rules."""
    from pipelines.deploy import export
    from pipelines.measure import intervals

    variant = made.config.compress[0].name
    nodes = {"base": "base", variant: f"compress.{variant}"}
    stored = {key: _stored(made, node) for key, node in graph.judged(nodes).items()}
    rows = intervals.table({name: intervals.read(stored[f"evaluation:{name}"].path) for name in nodes})
    _, broken = gate.choose(evidence_of(stored), PromoteConfig())
    sentence = export.write(stored[f"model:{variant}"], destination, about=_about(stored, variant))
    report = str(Runs(made.store.root).folder(run_id) / REPORT) if run_id else None
    verdict = broken[0] if broken else None
    if as_json:
        said = {"folder": str(destination), "load": sentence, "models": rows, "within_budget": not broken}
        print(json.dumps(said | {"beyond": verdict, "corpus": place.said, "run": run_id, "report": report}, indent=1))
        return
    base_bytes = rows[0]["size_bytes"]
    shown = [_shown(row, base_bytes) for row in rows]
    console.table(shown, list(shown[0]), as_json=False)
    print(f"The gate would refuse {verdict}." if broken else "Within the budgets of the gate ([promote] of a recipe).")
    print(f"{destination}: {sentence}")
    if report:
        print(f"Report: {report}")


def _shown(row: Mapping[str, Any], base_bytes: int) -> dict[str, Any]:
    ratio = None if row["ratio"] is None else f"{row['ratio']:.4f} [{row['ratio_low']:.4f}, {row['ratio_high']:.4f}]"
    return {
        "model": _NAMED.get(row["model"], row["model"]),
        "bits/byte": row["bits_per_byte"],
        "of the original's": ratio,
        "KL nats/token": row["kl"],
        "size": quantity.size(row["size_bytes"]),
        "of its bytes": f"{row['size_bytes'] / base_bytes:.3f}",
    }


def _about(stored: Mapping[str, Artifact], variant: str) -> Any:
    from pipelines.deploy.export import About
    from pipelines.registry import model_card

    card = model_card.of_artifact(dict(stored), variant)
    return About(variant, card, model_card.licence_of(card))


def _stored(made: RunPlan, node: str) -> Artifact:
    identified = made.graph[node]
    found = made.store.find(identified.node.stage.name, identified.fingerprint)
    assert found is not None, node
    return found
