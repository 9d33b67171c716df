"""Service keys: how they are made, known and revoked."""
