"""Compression methods, one file each; a module's name is its registry name."""
