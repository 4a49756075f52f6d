"""Implementations of the push ports: one module per provider."""
