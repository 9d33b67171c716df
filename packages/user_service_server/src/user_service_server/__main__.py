"""`python -m user_service_server` is `user-service`."""

from .cli import main

main()
