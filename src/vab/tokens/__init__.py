"""Audio tokens without a network: which codes training hides (masking), how hidden codes are filled (decoding).

Pure functions of tensors. All random numbers come from ``noise``: each belongs to a record, not to a batch.
"""
