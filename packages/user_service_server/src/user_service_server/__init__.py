"""The User Service: who a user is, how to reach them, and whether they may be reached now."""
