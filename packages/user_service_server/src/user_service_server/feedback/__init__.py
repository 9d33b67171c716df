"""Feedback: what providers said of tokens and addresses, and what becomes of it."""
