"""A Progress for tests that look at the result alone."""


def silent(share: float, text: str) -> None:
    """Shows nothing."""
