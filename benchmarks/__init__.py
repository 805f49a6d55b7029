"""Benchmarks: `python -m benchmarks cpu` or `gpu` measures, `python -m benchmarks.report` prints tables, bars and figures."""
