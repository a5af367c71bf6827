"""The verbs of `ingot data`; like those of `ingot`, each imports what it needs when it is called."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flows.commands.options import Json, Recipe

app = typer.Typer(help="The corpus: DVC for people who do not want to learn DVC today.", no_args_is_help=True)


@app.command("status")
def data_status(as_json: Json = False) -> None:
    """Say whether data/ is what data.dvc says."""
    _data("status", as_json=as_json)


@app.command("pull")
def data_pull(as_json: Json = False) -> None:
    """Fetch the corpus that data.dvc names from the DVC remote."""
    _data("pull", as_json=as_json)


@app.command("push")
def data_push(as_json: Json = False) -> None:
    """Send the corpus to the DVC remote."""
    _data("push", as_json=as_json)


@app.command("add")
def data_add(as_json: Json = False) -> None:
    """Take the present content of data/ as the corpus: writes data.dvc."""
    _data("add", as_json=as_json)


@app.command("import")
def data_import(
    url: Annotated[
        str, typer.Argument(help="File, folder or pattern of texts: a path, s3://..., https://...; quote patterns.")
    ],
    as_json: Json = False,
) -> None:
    """Fetch a corpus from elsewhere into data/ and take it as the corpus."""
    _data("import", url, as_json=as_json)


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


def _data(verb: str, *arguments: Any, as_json: bool) -> None:
    from flows.commands import data as command

    command.run(verb, *arguments, as_json=as_json)
