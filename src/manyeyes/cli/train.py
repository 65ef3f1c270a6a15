"""`manyeyes train`."""
def command() -> None:
    """Not written yet."""
    raise NotImplementedError
