"""Where users are kept: Postgres, the cache of encoded documents, and the one way to write."""
