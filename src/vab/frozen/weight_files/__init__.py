"""Files of weights: which are published where, how they are found, fetched, checked and read."""
