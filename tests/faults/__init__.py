"""Faults from outside: kills, refused writes, two commands at once, damaged files. A short form in `make test`.

The long forms are commands that print what docs/reliability.md quotes: `python -m tests.faults.kills --help`.
"""
