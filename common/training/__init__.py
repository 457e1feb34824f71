"""The one loop, its checkpoints, and how micro-batches are chosen to fit into memory."""
