"""Credentials: passwords, how they are judged, hashed and changed."""
