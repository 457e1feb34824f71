"""The contract of `common/backend.py` in MLX, over mlx-lm's layers."""


def create():  # type: ignore[no-untyped-def]
    """The backend; importing its framework only now."""
    from mlx_backend.backend import MlxBackend

    return MlxBackend()
