"""Rules that documents must pass, chosen by source: one file for each, named by `prepare.rules.*.name`."""
