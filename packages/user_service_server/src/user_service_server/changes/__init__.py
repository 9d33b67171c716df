"""Changes: the log of what was committed, as a feed that skips nothing."""
