"""Devices: the push tokens by which a user is reached."""
