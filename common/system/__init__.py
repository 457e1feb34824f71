"""The machine: devices, memory, processes, the user's cache. Knows no model."""
