"""Audio tokens without a network: which codes to hide in training (masking), how to fill hidden codes (decoding).

Pure functions of tensors. Chance comes from ``noise``: every random number belongs to a record, not to a batch.
"""
