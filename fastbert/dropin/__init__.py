"""The drop-in: models that people already run, made fast in place. A table of facts (`facts`) and one swap (`swap`)."""

from .swap import Report, accelerate, explain, restore

__all__ = ["Report", "accelerate", "explain", "restore"]
