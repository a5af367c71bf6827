"""MLflow tracking that never delays and never fails a stage."""
