"""Corpora on engines that share work among processes and machines: torchrun, Ray, Spark.

An engine shares out units, each a few numbers, and gets receipts back; reading, computing, writing and the order in
which a part comes to count are those of `fastbert.corpus`, so an engine that runs a unit twice does no harm. Where data
must pass through the engine, `batches.py` has what its maps call.
"""
