"""Measures the engine beside its peers: ``python -m benchmarks`` prints one table and draws one plot."""
