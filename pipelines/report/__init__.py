"""The report of a run: one self-contained HTML page from the run record and its artifacts."""
