"""TensorFlow 2's graph of the objects that hold the variables: it names variables that a SavedModel only numbers.

A checkpoint of TensorFlow 2 names a variable by the shortest path of attributes that leads to it, where a dot in an
attribute's name is written twice, and a slash as ".S". A Keras model in a SavedModel also has a list of all its
variables, and for most variables the path through that list is the shortest:

    variables/7/.ATTRIBUTES/VARIABLE_VALUE
    layer_with_weights-0/_transformer_layers/0/_attention_layer/_query_dense/kernel/.ATTRIBUTES/VARIABLE_VALUE

The graph is one of the checkpoint's variables, a string named _CHECKPOINTABLE_OBJECT_GRAPH. It is a protocol buffer:

    TrackableObjectGraph   1: nodes
    node                   1: children (1: number of the child's node, 2: its name here), 2: attributes (3: variable)

See tensorflow/core/protobuf/trackable_object_graph.proto.
"""

from __future__ import annotations

import re
from collections import deque

from ..storage import CheckpointError
from .protobuf import Malformed, parse_message
from .tensorflow_bundle import read_string
from .variable import Variable

_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_NUMBERED = re.compile(rf"((^|.*/)(variables|trainable_variables|non_trainable_variables)/\d+){re.escape(_VALUE)}")
# Keras' lists, which repeat objects that are attributes as well.
_LISTS = re.compile(
    r"_?(trainable_|non_trainable_)?(variables|weights)|keras_api|signatures|regularization_losses|layer-\d+"
)


def with_names(variables: dict[str, Variable]) -> dict[str, Variable]:
    """The variables of a checkpoint. Those that are only numbered are named by their paths in the graph of objects.

    A variable without a path outside of lists keeps its number. Raises: CheckpointError if variables are numbered and
    the graph is missing or damaged.
    """
    numbered = [name for name in variables if _NUMBERED.fullmatch(name)]
    if not numbered:
        return variables
    if _GRAPH not in variables:
        raise CheckpointError(f"its variables are only numbered ({numbered[0]}), and there is no {_GRAPH} to name them")
    try:
        paths = _paths(read_string(variables[_GRAPH]))
    except (Malformed, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{_GRAPH} is damaged ({error})") from error
    return dict(sorted((paths.get(name, name), variable) for name, variable in variables.items()))


def _paths(graph: bytes) -> dict[str, str]:
    """A variable's name in the checkpoint -> the shortest path to it that does not go through a list."""
    nodes = [parse_message(node) for node in parse_message(graph).get(1, [])]
    paths: dict[str, str] = {}
    seen, waiting = {0}, deque([(0, "")])
    while waiting:
        number, path = waiting.popleft()
        if number >= len(nodes):
            raise Malformed(f"it has {len(nodes)} objects, and names number {number}")
        for attribute in nodes[number].get(2, []):
            for key in parse_message(attribute).get(3, []):
                if key.endswith(_VALUE.encode()):
                    paths[key.decode()] = path.removeprefix("/") + _VALUE
        for child in map(parse_message, nodes[number].get(1, [])):
            to, name = child.get(1, [0])[-1], child.get(2, [b""])[-1].decode()
            if to not in seen and not _LISTS.fullmatch(name):
                seen.add(to)
                waiting.append((to, f"{path}/{name.replace('.', '..').replace('/', '.S')}"))
    return paths
