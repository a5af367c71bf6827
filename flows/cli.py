"""The `ingot` command. Each verb imports what it needs when it is called, so `-h` answers at once."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Literal

import typer

from flows import console, data_cli, logs
from flows.commands.options import Json, Recipe, with_common_options
from pipelines.core import boundary, environment, stop
from pipelines.core.errors import DiskFullError, IngotError
from pipelines.core.redaction import redact

app = typer.Typer(
    name="ingot",
    help="From a DVC-versioned corpus to a compressed, evaluated, promoted language model.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
app.add_typer(data_cli.app, name="data")

_KEPT_RUNS = 3
_MODEL = "`champion`, NAME@ALIAS, NAME/VERSION, a node (or RUN/NODE), a fingerprint or a folder"
"""How any artifact is named; `flows.commands.lookup` finds it."""

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted settings over the recipe.")
]
Only = Annotated[str | None, typer.Option("--only", help="Run this stage alone, on the artifacts that exist.")]
Since = Annotated[str | None, typer.Option("--from", help="Run this stage again, and everything below it.")]
Force = Annotated[list[str] | None, typer.Option("--force", help="Run this stage again although nothing changed.")]
RunId = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="Id of a run or its beginning; the newest if left out.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from flows.commands import version as command

        command.show()
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the versions of Ingot and of what it stands on.",
            is_eager=True,
            callback=_print_version,
        ),
    ] = False,
) -> None:
    del version  # its callback has printed it


@app.command()
def new(
    place: Annotated[str, typer.Argument(metavar="FOLDER", help="Name or path of the folder to create.")],
    corpus: Annotated[
        str | None,
        typer.Option(
            "--data", help="Folder, file, pattern or URL of the corpus, of any format that is read. Later if left out."
        ),
    ] = None,
    family: Annotated[
        Literal["decoder", "encoder"], typer.Option(help="decoder: writes on; encoder: embeds and fills in.")
    ] = "decoder",
    text_field: Annotated[
        str, typer.Option(metavar="FIELD", help="Field or column of a record that holds the text; a.b: b of a.")
    ] = "text",
) -> None:
    """Make a project with a corpus, a recipe and a store of its own, and show its first plan."""
    from flows.commands import new as command

    command.new(place, corpus, family, text_field)


@app.command()
def plan(
    overrides: Overrides = None,
    recipe: Recipe = None,
    only: Only = None,
    since: Since = None,
    force: Force = None,
    world_size: Annotated[
        int | None,
        typer.Option("--world-size", min=1, help="Plan for so many ranks on a machine that is not this one."),
    ] = None,
    drawn: Annotated[
        bool, typer.Option("--graph", help="Print the graph with the state of each stage, as a Mermaid flowchart.")
    ] = False,
    jobs: Annotated[
        bool, typer.Option("--jobs", help="Print the job of each stage that would be submitted, and have it checked.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what a run would do, why, and what it takes; exit as a run would that is refused. Changes nothing."""
    from flows.commands import run as command

    flags = {"as_json": as_json, "drawn": drawn, "jobs": jobs}
    code = command.plan(recipe, overrides or [], only, since, force or [], world_size=world_size, **flags)
    raise typer.Exit(code)


@app.command()
def run(
    overrides: Overrides = None,
    recipe: Recipe = None,
    only: Only = None,
    since: Since = None,
    force: Force = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Exit with 6 if another run works on a stage.")] = False,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", "-k", help="After a stage failed, run what does not need it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Take the corpus to a champion. What is cached stays cached; what was interrupted goes on."""
    from flows.commands import run as command

    wait_s = 0.0 if no_wait else None
    selection = (only, since, force or [])
    command.run(recipe, overrides or [], *selection, wait_s=wait_s, keep_going=keep_going, as_json=as_json)


@app.command()
def compress(
    target: Annotated[str, typer.Argument(metavar="MODEL", help=f"A model folder, {_MODEL}.")],
    overrides: Overrides = None,
    method: Annotated[str, typer.Option(help="How; `ingot list compressors` shows the methods.")] = "rtn",
    bits: Annotated[str | None, typer.Option(help="Bits of a weight; the method's default if left out.")] = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Folder, file or URL of the text to calibrate and measure on. If left out: the corpus of this "
            "project; without one, Python's language reference.",
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder to create; MODEL-METHOD here if left out.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the recipe and the plan.")] = False,
    as_json: Json = False,
) -> None:
    """Compress one model, measure it beside the original, and write it to a folder; registers nothing."""
    from flows.commands import compress as command

    code = command.compress(
        target, method, bits, overrides or [], data=corpus, out=out, dry_run=dry_run, as_json=as_json
    )
    raise typer.Exit(code)


@app.command()
def resume(run_id: RunId = None, as_json: Json = False) -> None:
    """Go on with a run that did not finish, with the configuration it had."""
    from flows.commands import run as command

    command.resume(run_id, as_json=as_json)


@app.command()
def cancel(
    run_id: RunId = None,
    grace_s: Annotated[
        float, typer.Option("--grace", min=0.0, help="Seconds that stages may take to save before they are killed.")
    ] = 10.0,
    as_json: Json = False,
) -> None:
    """End a run on every machine that it works on; what it has saved is kept."""
    from flows.commands import cancel as command

    command.cancel(run_id, grace_s, as_json=as_json)


@app.command()
def status(
    run_id: RunId = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run ends, and exit as it did; Ctrl-C stops looking.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show how far a run is."""
    from flows.commands import show as command

    stop.only_looking()  # Ctrl-C stops looking, with 130; 75 is what a run ends with that was stopped
    raise typer.Exit(command.status(run_id, follow=follow, as_json=as_json))


@app.command()
def show(
    target: Annotated[str, typer.Argument(help=f"A run, {_MODEL}, `config` or `schema`.")],
    overrides: Overrides = None,
    recipe: Recipe = None,
    as_json: Json = False,
    as_toml: Annotated[bool, typer.Option("--toml", help="`config` as a recipe, for `--recipe`.")] = False,
) -> None:
    """Show everything known of one thing: where it came from, what it holds, how it measured."""
    from flows.commands import show as command

    command.show(target, recipe, overrides or [], as_json=as_json, as_toml=as_toml)


@app.command()
def diff(
    old: Annotated[str, typer.Argument(help=f"A run, or {_MODEL}.")],
    new: Annotated[str, typer.Argument(help="The same.")],
    as_json: Json = False,
) -> None:
    """Say which settings, inputs and results differ between two runs or two artifacts."""
    from flows.commands import show as command

    command.diff(old, new, as_json=as_json)


@app.command("list")
def list_(
    what: Annotated[
        str,
        typer.Argument(
            help="models, champions, runs, artifacts, recipes; compressors, optimizers, objectives, monitors, probes, "
            "stages or executors."
        ),
    ],
    as_json: Json = False,
) -> None:
    """List what there is."""
    from flows.commands import list as command

    command.show(what, as_json=as_json)


@app.command()
def promote(
    candidate: Annotated[
        str | None, typer.Argument(help=f"{_MODEL}, or a run; the recipe's choice if left out.")
    ] = None,
    run_id: Annotated[
        str | None, typer.Option("--run", help="The run that made it; the newest that has it if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Put a model of a finished run through the gate, and make it champion if it passes."""
    from flows.commands import run as command

    command.promote(candidate, run_id, as_json=as_json)


@app.command()
def rollback(
    model: Annotated[
        str | None, typer.Argument(help="Registered model, or NAME@champion; the only one if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make the previous champion the champion again."""
    from flows.commands import store as command

    command.rollback(model, as_json=as_json)


@app.command()
def export(
    target: Annotated[str, typer.Argument(help=f"{_MODEL}, or a run.")],
    destination: Annotated[str, typer.Argument(help="Folder to create, or the .gguf file.")],
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="hf: the model folder; gguf: llama.cpp (decoder); onnx: onnxruntime (encoder); torchao: transformers.",
        ),
    ] = "hf",
    precision: Annotated[
        str | None,
        typer.Option(
            help="gguf: f16, f32, q8_0, q4_0; onnx: fp32, int8; torchao: int8, int8-dynamic, int4. Default: the first."
        ),
    ] = None,
    weights_only: Annotated[
        bool,
        typer.Option("--weights-only", help="Go on where a format leaves out rounded inputs or a quantized cache."),
    ] = False,
) -> None:
    """Write a model for use elsewhere, and say what loads it."""
    from flows.commands import store as command

    command.export(target, destination, file_format, precision, weights_only=weights_only)


@app.command("try")
def try_(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Models, or a run with all of its; if left out, the newest run's."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help="Text to go on with, again for several; [MASK] or ___ for a word that an encoder fills in. If left "
            "out: the lines of standard input, or on a terminal the first words of held-out documents.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to write at most; 64, or as many as there is room for.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the logits before a token is drawn, 0.8; 0 takes the likeliest.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many of the likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens that together have this probability.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws of every text, 0.")] = None,
    neighbours: Annotated[
        bool, typer.Option("--neighbours", help="Encoder: find the held-out sentences nearest to each prompt.")
    ] = False,
    count: Annotated[int | None, typer.Option(min=1, help="Encoder: words for a mask, or neighbours; 5.")] = None,
    as_json: Json = False,
) -> None:
    """Ask models: a decoder goes on with a prompt, an encoder fills in words; several models side by side."""
    from flows.commands import tryout as command

    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    command.run(models or [], prompt or [], options, neighbours=neighbours, count=count, as_json=as_json)


@app.command()
def verify(
    target: Annotated[str | None, typer.Argument(help=f"A run, or {_MODEL}; every artifact if left out.")] = None,
    as_json: Json = False,
) -> None:
    """Hash artifacts again and compare them with their manifests."""
    from flows.commands import store as command

    command.verify(target, as_json=as_json)


@app.command()
def gc(
    keep: Annotated[
        int,
        typer.Option(
            "--keep", min=0, help="How many of the newest finished runs stay, and of those that can be gone on with."
        ),
    ] = _KEPT_RUNS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask; needed where there is no terminal.")] = False,
    as_json: Json = False,
) -> None:
    """Remove artifacts, checkpoints and leftovers that no run at work, new run or registered model needs."""
    from flows.commands import store as command

    command.gc(keep, dry_run=dry_run, yes=yes, as_json=as_json)


@app.command()
def delete(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="Id of a run or its beginning.")], as_json: Json = False
) -> None:
    """Remove the record and the report of a run; `ingot gc` frees what only that run needed."""
    from flows.commands import store as command

    command.delete(run_id, as_json=as_json)


@app.command()
def sync(as_json: Json = False) -> None:
    """Send MLflow what it missed while it could not be reached."""
    from flows.commands import store as command

    command.sync(as_json=as_json)


@app.command()
def deploy(
    recipe: Recipe = None,
    pool: Annotated[str, typer.Option(help="Name of the work pool.")] = "ingot",
    pool_type: Annotated[
        Literal["process", "kubernetes"],
        typer.Option(help="process: also for the login node of a Slurm cluster, with compute.executor = slurm."),
    ] = "process",
    cron: Annotated[str | None, typer.Option(help="Run the whole graph by this schedule, in UTC: '0 2 * * *'.")] = None,
    every: Annotated[int | None, typer.Option(min=60, metavar="SECONDS", help="Run it so often.")] = None,
    on_data: Annotated[bool, typer.Option("--on-data", help="Run it when `ingot data push` sent a revision.")] = False,
    notify: Annotated[
        str | None, typer.Option(metavar="URL", help="POST failures, refusals of the gate and promotions there.")
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option(metavar="NAME=SLOTS", help="A global concurrency limit that its stages wait for, as gpu=2."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which deployments there would be.")] = False,
    as_json: Json = False,
) -> None:
    """Put this project on the Prefect server: pool, deployments, schedules, automations. Again: brought up to date."""
    from flows.commands import deploy as command

    asked = command.wanted(recipe, pool, pool_type, cron, every, notify, limit, on_data=on_data)
    command.run(asked, dry=dry_run, as_json=as_json)


@app.command()
def doctor(
    link_cache: Annotated[
        bool, typer.Option("--link-cache", help="First let the corpus and DVC's cache share the disk by links.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check this machine and this project, and say what is missing and how to get it."""
    from flows.commands import doctor as command

    if link_cache:
        command.link_cache()
    command.doctor(as_json=as_json)


for _app in (app, data_cli.app):
    for _command in _app.registered_commands:
        assert _command.callback is not None
        _command.callback = with_common_options(_command.callback)


def main() -> None:
    """Run the command line; errors of ours become a message and their exit code."""
    stop.install()
    console.survive_closed_terminal()
    logs.start()
    environment.find_home()
    environment.reach_this_machine()
    try:
        app()
    except Exception as error:  # noqa: BLE001 - nothing of it is lost: it is in the log
        if (known := boundary.known(error)) is None:
            print(logs.unexpected(error), file=sys.stderr)
            sys.exit(1)
        if known is not error:
            logs.foreseen(error)
        print(redact(f"ingot: {known}"), file=sys.stderr)
        if isinstance(known, DiskFullError):
            from flows.commands.store import reclaimable

            with contextlib.suppress(OSError, IngotError):
                print(f"  -> {reclaimable(_KEPT_RUNS)}", file=sys.stderr)
        sys.exit(known.exit_code)


if __name__ == "__main__":
    main()
