def create():  # type: ignore[no-untyped-def]
    """The backend; importing its framework only now."""
    from torch_backend.trainer import TorchBackend

    return TorchBackend()
