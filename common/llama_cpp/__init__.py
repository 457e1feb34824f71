"""Find, build and call llama.cpp: the only package that starts its programs."""
