"""Health: whether the service and what it depends on are there."""
