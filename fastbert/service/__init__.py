"""BERT over HTTP: `fastbert serve`."""
