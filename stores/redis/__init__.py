"""The accelerator: Redis or Valkey. Losing it costs speed, never correctness."""
