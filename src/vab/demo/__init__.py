"""The offline synthetic audio-visual world, the makers of the shipped weights, and what a model of it is worth."""
