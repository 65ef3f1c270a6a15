"""`manyeyes serve`."""
def command() -> None:
    """Not written yet."""
    raise NotImplementedError
