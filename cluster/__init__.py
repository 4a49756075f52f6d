"""Bring-up, embedded services, health and the command line."""
