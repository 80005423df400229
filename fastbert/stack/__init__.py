"""The layers of an encoder: one description of a layer, and the one way in which all of them run packed."""
