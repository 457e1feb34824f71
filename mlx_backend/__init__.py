def create():  # type: ignore[no-untyped-def]
    """The backend; importing its framework only now."""
    from mlx_backend.trainer import MlxBackend

    return MlxBackend()
