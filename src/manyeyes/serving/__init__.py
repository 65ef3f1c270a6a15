"""Serving: a bundle behind HTTP."""
