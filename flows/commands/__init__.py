"""The verbs of the `ingot` command, one file a family."""
