"""Fakes and local provider servers that ship with the project: demos, tests and benchmarks use them."""
