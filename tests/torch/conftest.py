"""One thread for torch: two take three times as long on tiny models, waiting for each other.

`TWINTUNE_TEST_DEVICE=cuda` runs these tests on an NVIDIA GPU, all but those of what is for CPUs alone.
"""

import pytest
import torch

from tests.backends import DEVICE

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu: of what the torch backend does on a CPU alone")
    config.addinivalue_line("markers", "gpu: of what it does on an NVIDIA GPU alone")


def pytest_collection_modifyitems(items):
    other = "gpu" if DEVICE == "cpu" else "cpu"
    for item in items:
        if item.get_closest_marker(other):
            item.add_marker(pytest.mark.skip(reason=f"for a {other.upper()} only; TWINTUNE_TEST_DEVICE is {DEVICE}"))
