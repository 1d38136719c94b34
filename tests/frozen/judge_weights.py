"""Random weights in the layouts in which the judges' weights are published, and what all judges must show."""

import torch
from torch import nn

from vab.frozen.batches import judge_sounds


def settle(network):
    """Give normalisation statistics of some use: those of an untrained network are 0 and 1."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)


def some_sounds(lengths):
    """Decaying noises, each of its own loudness and colour."""
    generator = torch.Generator().manual_seed(2)
    sounds = []
    for number, length in enumerate(lengths):
        noise = torch.randn(length + 4, generator=generator).unfold(0, 5, 1) @ torch.linspace(1, number - 2, 5)
        sounds.append(0.2 * 4.0**-number * noise * torch.linspace(1, 0.1, length))
    return sounds


def assert_independent_of_the_batch(judge, lengths):
    """Embeddings and logits of each sound, alone and among others of any lengths, equal to 1e-5 of the largest."""
    sounds = some_sounds(lengths)
    alone = [judge_sounds(judge, [sound], judge.sample_rate) for sound in sounds]
    for batch_size in (2, 16):
        together = judge_sounds(judge, sounds, judge.sample_rate, batch_size)
        assert together.rows.tolist() == [int(one.rows) for one in alone]
        for field in ("embedding", "logits"):
            expected, got = torch.cat([getattr(one, field) for one in alone]), getattr(together, field)
            if expected.numel():
                assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    return together
