"""Accelerates existing models in place: a table of known models (`families`), and one swap of `forward` (`swap`)."""

from .attention_interface import register_attention
from .explain import Report, explain
from .swap import accelerate, restore

__all__ = ["Report", "accelerate", "explain", "register_attention", "restore"]
