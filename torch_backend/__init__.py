"""The contract of `common/backend.py` in PyTorch and PEFT's conventions."""


def create():  # type: ignore[no-untyped-def]
    """The backend; importing its framework only now."""
    from torch_backend.backend import TorchBackend

    return TorchBackend()
