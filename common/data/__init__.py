"""A row becomes a Batch: read, normalized, rendered, labeled, truncated, batched. Pure Python and numpy; a tokenizer is
the only guest.
"""
