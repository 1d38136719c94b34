"""Trains the tiny frozen networks whose weights the package ships, in `vab/frozen/weights`."""
