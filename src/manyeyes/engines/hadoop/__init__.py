"""The hadoop engine: MapReduce on YARN, driven through the cluster's own `hadoop` command."""

from manyeyes.engines.hadoop.engine import HadoopEngine, HadoopSettings, create

__all__ = ["HadoopEngine", "HadoopSettings", "create"]
