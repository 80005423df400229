"""The faces of the service: one module for each API that clients expect."""
