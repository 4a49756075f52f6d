"""What Redis is used for: speed, never truth."""
