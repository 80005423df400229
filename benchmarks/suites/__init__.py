"""The suites, one file each, and studies with a command of their own."""
