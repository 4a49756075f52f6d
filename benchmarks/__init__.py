"""Load generator, verdicts and reports: `python -m benchmarks` (method: benchmarks/README.md)."""
