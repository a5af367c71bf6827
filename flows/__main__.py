"""`python -m flows`, and what the script `ingot` calls: signals are taken over before anything big is imported."""

from __future__ import annotations

from pipelines.core import stop


def main() -> None:
    """Run the command line."""
    stop.install()
    from flows import cli

    cli.main()


if __name__ == "__main__":
    main()
