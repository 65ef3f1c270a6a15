"""`manyeyes predict`."""
def command() -> None:
    """Not written yet."""
    raise NotImplementedError
