"""The promote stage: gate, MLflow model registry, model card, rollback."""
