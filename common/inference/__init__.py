"""Models that answer messages, in llama.cpp or in a backend."""
