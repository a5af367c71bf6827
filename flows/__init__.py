"""Orchestration only: configuration, the graph, Prefect, and the `ingot` command."""
