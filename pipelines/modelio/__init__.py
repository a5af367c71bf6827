"""Reading, writing and loading a model folder; the only place that knows layouts."""
