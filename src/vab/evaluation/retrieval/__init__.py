"""Retrieval between sound and video: galleries of embeddings, recall among them, and search with one file."""
