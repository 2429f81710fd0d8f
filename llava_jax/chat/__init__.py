"""The chat in the terminal. Read __main__.py, then conversation.py."""
