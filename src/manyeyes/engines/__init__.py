"""Engines: where map, map_reduce and gang jobs run. `base` is the seam; `registry` makes an engine from its name."""
