"""Thin actor shells: mailbox, timers, life cycle. Every decision is delegated to the core."""
