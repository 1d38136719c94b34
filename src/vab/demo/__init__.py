"""The offline synthetic audio-visual world, and how well a model of it does."""
