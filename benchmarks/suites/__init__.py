"""What is measured: a file a suite, and studies that have a command of their own."""
