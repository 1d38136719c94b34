"""Metrics: pure functions of embeddings, scores and codes, and torchmetrics classes for them. No networks, no files."""
