"""The verbs of `ingot data`; like those of `ingot`, each imports what it needs when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.options import Json, Recipe

app = typer.Typer(help="The corpus: DVC for people who do not want to learn DVC today.", no_args_is_help=True)


Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the recipe, as data.path=FOLDER.")
]
Prepared = Annotated[
    bool, typer.Option("--prepared", help="The prepared corpus of the recipe, by its fingerprint, and not the files.")
]


@app.command("status")
def data_status(settings: Settings = None, recipe: Recipe = None, as_json: Json = False) -> None:
    """Say whether data/ is what data.dvc says, and whether the DVC remote has it."""
    from flows.commands import data as command

    command.run("status", settings, recipe, as_json=as_json)


@app.command("pull")
def data_pull(
    settings: Settings = None,
    prepared: Prepared = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that were edited here.")] = False,
    recipe: Recipe = None,
    as_json: Json = False,
) -> None:
    """Fetch the corpus that data.dvc names from the DVC remote, or what was prepared of it."""
    from flows.commands import data as command

    if prepared:
        command.pull_prepared(settings, recipe, as_json=as_json)
    else:
        command.run("pull", settings, recipe, as_json=as_json, force=force)


@app.command("push")
def data_push(
    settings: Settings = None,
    prepared: Prepared = False,
    into_git: Annotated[
        bool, typer.Option("--into-git", help="Also where the remote is a folder that git commits.")
    ] = False,
    recipe: Recipe = None,
    as_json: Json = False,
) -> None:
    """Send the corpus to the DVC remote, or what was prepared of it, so that another machine need not prepare."""
    from flows.commands import data as command

    if prepared:
        command.push_prepared(settings, recipe, into_git=into_git, as_json=as_json)
    else:
        command.run("push", settings, recipe, as_json=as_json, into_git=into_git)


@app.command("add")
def data_add(settings: Settings = None, recipe: Recipe = None, as_json: Json = False) -> None:
    """Take the present content of data/ as the corpus: writes data.dvc."""
    from flows.commands import data as command

    command.run("add", settings, recipe, as_json=as_json)


@app.command("import")
def data_import(
    url: Annotated[
        str, typer.Argument(help="File, folder or pattern of texts: a path, s3://..., https://...; quote patterns.")
    ],
    settings: Settings = None,
    recipe: Recipe = None,
    as_json: Json = False,
) -> None:
    """Fetch a corpus from elsewhere into data/ and take it as the corpus."""
    from flows.commands import data as command

    command.run("import", settings, recipe, url, as_json=as_json)


@app.command("update")
def data_update(
    settings: Settings = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that were edited here.")] = False,
    recipe: Recipe = None,
    as_json: Json = False,
) -> None:
    """Fetch the corpus anew from where it was imported from, and take that as the corpus."""
    from flows.commands import data as command

    command.run("update", settings, recipe, as_json=as_json, force=force)


@app.command("log")
def data_log(
    settings: Settings = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Versions at most.")] = 20,
    recipe: Recipe = None,
    as_json: Json = False,
) -> None:
    """List the versions of the corpus that git knows, newest first."""
    from flows.commands import data as command

    command.log(settings, recipe, count, as_json=as_json)


@app.command("diff")
def data_diff(
    old: Annotated[str, typer.Argument(metavar="[REV1]", help="A git revision.")] = "HEAD",
    new: Annotated[str | None, typer.Argument(metavar="[REV2]", help="Another; the work tree if left out.")] = None,
    settings: Settings = None,
    recipe: Recipe = None,
    as_json: Json = False,
) -> None:
    """Compare two versions of the corpus: documents by id and text, sources, bytes, tokens."""
    from flows.commands import data as command

    command.diff(old, new, settings, recipe, as_json=as_json)


@app.command("gc")
def data_gc(
    keep: Annotated[
        str,
        typer.Option(help="What stays: the versions of all `commits`, of `branches`, of `tags`, of the `work-tree`."),
    ] = "commits",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove from the DVC cache what no version of the corpus needs; the remote stays as it is."""
    from flows.commands import data as command

    command.gc(keep, dry_run=dry_run, yes=yes, as_json=as_json)


@app.command("check")
def data_check(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH] [KEY=VALUE]...", help="File or folder, data/ if left out; and settings."),
    ] = None,
    recipe: Recipe = None,
    as_json: Json = False,
) -> None:
    """Read up to 1,000 records and say what a run would do: formats, fields, sizes, what is refused and why."""
    from flows.commands import data as command

    command.check(arguments or [], recipe, as_json=as_json)


@app.command("show")
def data_show(
    target: Annotated[str, typer.Argument(metavar="[RUN]", help="A run or a trained model.")] = "pretrain",
    step: Annotated[int, typer.Option(help="Step, counted from 1 as in metrics.jsonl.")] = 1,
    rank: Annotated[int | None, typer.Option(help="One rank only.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Number of ranks; that of the run if left out.")] = None,
    as_json: Json = False,
) -> None:
    """List the documents that a training step saw, by rank: the newest training's if no other is named."""
    from flows.commands import data as command

    command.show(target, step, rank, ranks, as_json=as_json)
