"""Layers that methods put in the place of linear ones while they train; imported when torch is wanted anyway."""
