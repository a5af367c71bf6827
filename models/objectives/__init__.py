"""What a model is asked to predict in pretraining: one file for each objective."""
