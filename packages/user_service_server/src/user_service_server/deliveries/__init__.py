"""May a message go to a user now?"""
