"""The prepare stage: reading, cleaning, deduplication, splitting, tokenizing, packing."""
