"""Deployment: a model of the store in a format that other programs run, one file a format."""
