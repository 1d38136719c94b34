"""Measurements of speed, each a ratio to something measured in the same run. Not part of the package."""
