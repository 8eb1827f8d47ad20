"""Timings against F.cross_entropy: `pytest benchmarks --benchmark-only`, then `benchmarks/report.py`."""
