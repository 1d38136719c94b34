"""Inputs to shards."""
