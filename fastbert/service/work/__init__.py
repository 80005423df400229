"""The tasks of models: how a request becomes pieces of tokens, and how a batch of pieces becomes results."""
