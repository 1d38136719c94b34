"""How good: pure functions over embeddings and codes, and torchmetrics states around them. No network, no files."""
