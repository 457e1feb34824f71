"""From a finished run to files that others use: fused folder, GGUF, MLX folder, card, upload."""
