"""Decoder and encoder families as transformers configurations."""
