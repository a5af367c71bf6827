"""Stages as functions over artifacts, and what they share."""
