"""How good a model is: mergeable sums over shards, metrics with their intervals, tables and pictures."""
