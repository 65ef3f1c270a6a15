"""Datasets: sources, ingest into Parquet shards, splits, the global order of examples and the input pipeline."""
