"""The truth: PostgreSQL."""
