"""Preferences: what a user wants to get, and the consent history."""
