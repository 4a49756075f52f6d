"""Implementations of the storage ports of the core."""
