"""`manyeyes ingest`."""
def command() -> None:
    """Not written yet."""
    raise NotImplementedError
