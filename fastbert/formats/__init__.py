"""Checkpoints of other frameworks, read under transformers' names: TensorFlow, early PyTorch, Keras, Paddle, GGUF."""

from .model import Model, open_model
from .opening import opened

__all__ = ["Model", "open_model", "opened"]
