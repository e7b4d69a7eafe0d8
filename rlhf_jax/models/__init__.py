"""The decoder, its families and its files. The only place that imports flax."""
