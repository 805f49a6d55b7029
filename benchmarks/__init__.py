"""Benchmarks: `python -m benchmarks cpu|gpu` measures, `python -m benchmarks.report` reports."""
