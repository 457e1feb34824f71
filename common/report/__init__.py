"""A run, or several, as a page: one HTML file that holds its charts, its style and its script, and asks no network.

Everything on it is what the run folder keeps. Of a run whose record lacks something, that part is left out.
"""
