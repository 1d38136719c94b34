"""Training: the `fit`, `validate`, `test` and `predict` commands, and the folders that runs write."""
