"""Where time, instructions and imports go: what is looked into, not compared."""
