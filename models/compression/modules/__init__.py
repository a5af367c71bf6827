"""Layers and caches that methods put in the place of plain ones; imported when torch is wanted anyway."""
