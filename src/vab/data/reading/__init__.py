"""Shards to batches.

``dataset`` reads records by their number, from ``tars`` into a ``batch``; ``mixed`` reads several data sets as one.
``order`` says which records each rank reads at each step, ``augment`` changes them, ``loader`` prefetches the batches.
``opening`` opens the data sets that the ``datamodule`` names, with their ``labels``; ``resume`` continues a run.
"""
