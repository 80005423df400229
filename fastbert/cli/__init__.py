"""The `fastbert` command: a file a command, found by main.py."""
