"""The measurement behind docs/adr/0005-asgi-framework.md."""
