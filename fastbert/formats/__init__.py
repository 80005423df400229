"""Other people's checkpoints under transformers' names: TensorFlow's, old PyTorch's, Keras', Paddle's and GGUF."""

from .model import Model, open_model
from .opening import opened

__all__ = ["Model", "open_model", "opened"]
