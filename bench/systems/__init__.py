"""The systems that spilld is compared with, each run as a process of its own by the Python of .venv-peers."""
