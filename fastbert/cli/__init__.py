"""The `fastbert` command: one file for each command, found by main.py."""
