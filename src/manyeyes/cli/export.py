"""`manyeyes export`."""
def command() -> None:
    """Not written yet."""
    raise NotImplementedError
