"""Compare what runs with what was trained: tokens, prompts, stops, distributions."""
