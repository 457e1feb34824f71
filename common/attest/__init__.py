"""A run becomes a file that a stranger can check: hashes, curves, label maps, distributions and answers.

What is stated is computed again from the run, figure by figure.
"""
