"""Users: registration, profiles, lookup and erasure."""
