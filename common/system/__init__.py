"""The machine: devices, memory, disks, processes, the user's cache. Knows no model."""
