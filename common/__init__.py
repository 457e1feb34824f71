"""Everything that both backends share.

A row's way: data -> training -> models (adapter, fused weights) -> export -> llama_cpp. Commands stand on top, system
below; `backend.py` is the contract that a backend fulfills. Who may import whom: tests/unit/test_architecture.py.
"""
