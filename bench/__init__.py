"""Measurements outside the package: speed as a ratio to something measured in the same run, and two stages."""
