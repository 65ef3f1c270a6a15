"""The command line: one small module a verb; each imports what it needs only when it runs."""
