"""The evaluate stage: bits per byte, tasks, size and latency."""
