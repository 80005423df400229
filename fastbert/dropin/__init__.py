"""The drop-in: models that people already run, made fast in place. A table of facts (`facts`) and one swap (`swap`)."""

from .attention_interface import register_attention
from .explain import Report, explain
from .swap import accelerate, restore

__all__ = ["Report", "accelerate", "explain", "register_attention", "restore"]
