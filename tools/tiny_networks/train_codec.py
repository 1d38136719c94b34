"""Trains the tiny codec on procedural sound: half of it the demo world's, half of every other sort."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.tiny_networks.training import TRAIN_SEED, Average, Clock, broad_sounds, world_sounds
from vab.audio import log_mel
from vab.frozen.codec.tiny import CodecConfig, CodecNetwork, TinyCodec

BATCH, CROP = 12, 16000
"""Waveforms per step, and their length in samples."""
PEAK_RATE = 8e-4
RESOLUTIONS = ((256, 64, 24), (512, 128, 40), (1024, 256, 80), (2048, 512, 128))
"""(n_fft, hop, num_bands) of the spectra that are compared, one of them in each step: more steps teach more."""
BARE_SHARE = 0.02
"""Share of the time for which the network trains without its quantiser, so that k-means finds something to cluster."""


class QuantiserTrainer:
    """Learns the codebooks: k-means to start with, then running means; entries out of use are born again.

    Source: van den Oord et al. 2017 (VQ-VAE), appendix A.1, with the restarts of Zeghidour et al. 2021 (SoundStream).
    """

    def __init__(self, network: CodecNetwork, decay: float = 0.99, least_use: float = 0.3) -> None:
        self.books = network.codebooks.data  # (K, S, code_dim)
        self.decay = decay
        self.least_use = least_use
        self.counts = torch.ones(self.books.shape[:2])
        self.sums = self.books.clone()

    @torch.no_grad()
    def start(self, latent: Tensor, rounds: int = 12) -> None:
        """Cluster (M, code_dim) latents level by level, M well above S."""
        levels, size, _ = self.books.shape
        self.books.copy_(residual_clusters(latent, levels, size, rounds)[0])
        self.counts.fill_(3.0)
        self.sums.copy_(3.0 * self.books)

    def __call__(self, latent: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise, let gradients pass straight through, and learn.

        Args:
            latent: (B, T, code_dim).
            levels: (B,) int64: how many levels each waveform may use; the decoder so learns to do with fewer.

        Returns:
            The sum of the chosen vectors, (B, T, code_dim), and the commitment loss.
        """
        residual, total, commitment = latent, torch.zeros_like(latent), latent.new_zeros(())
        for level, entries in enumerate(self.books):
            used = levels > level  # (B,)
            vectors = residual[used].detach().reshape(-1, latent.shape[-1])
            code = torch.cdist(vectors, entries).argmin(dim=1)
            chosen = torch.zeros_like(latent)
            chosen[used] = entries[code].reshape(-1, *latent.shape[1:])
            commitment = commitment + F.mse_loss(residual[used], chosen[used])
            self._learn(level, vectors, code)
            total, residual = total + chosen, residual - chosen
        return latent + (total - latent).detach(), commitment

    @torch.no_grad()
    def _learn(self, level: int, vectors: Tensor, code: Tensor) -> None:
        counts, sums = _totals(vectors, code, self.books.shape[1])
        self.counts[level].lerp_(counts, 1 - self.decay)
        self.sums[level].lerp_(sums, 1 - self.decay)
        dead = self.counts[level] < self.least_use
        if dead.any():
            born = vectors[torch.randint(len(vectors), (int(dead.sum()),))]
            self.counts[level][dead] = 1.0
            self.sums[level][dead] = born
        self.books[level] = self.sums[level] / self.counts[level][:, None]


@torch.no_grad()
def residual_clusters(vectors: Tensor, levels: int, size: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Codebooks by k-means, level by level: each clusters what those before it leave.

    Args:
        vectors: (M, code_dim) float32, M well above `size`.
        levels: How many codebooks.
        size: Entries of each.
        rounds: Of k-means; an entry that no vector is nearest to is born again as some vector.

    Returns:
        The codebooks, (levels, size, code_dim), and what they leave of the vectors, (M, code_dim).
    """
    books = []
    for _ in range(levels):
        entries = vectors[torch.randperm(len(vectors))[:size]]
        for _ in range(rounds):
            counts, sums = _totals(vectors, torch.cdist(vectors, entries).argmin(dim=1), size)
            means = sums / counts.clamp_min(1)[:, None]
            strangers = vectors[torch.randperm(len(vectors))[:size]]
            entries = torch.where(counts[:, None] > 0, means, strangers)
        vectors = vectors - entries[torch.cdist(vectors, entries).argmin(dim=1)]
        books.append(entries)
    return torch.stack(books), vectors


def _totals(vectors: Tensor, code: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(size,) how many vectors have each code, and (size, code_dim) their sums."""
    sums = torch.zeros(size, vectors.shape[1]).index_add_(0, code, vectors)
    return torch.bincount(code, minlength=size).float(), sums


def draw_batch(rng: np.random.Generator, world: np.ndarray, broad: np.ndarray) -> Tensor:
    """(BATCH, CROP) float32: crops at random places and levels, half from each pool, some mixed with another."""
    rows = []
    for i in range(BATCH):
        x = _crop(rng, world if i % 2 else broad)
        if rng.random() < 0.15:
            x = x + _crop(rng, world if rng.random() < 0.5 else broad) * 10 ** (rng.uniform(-15, 0) / 20)
        x = x * 10 ** (rng.uniform(-18, 6) / 20) * rng.choice([-1.0, 1.0])
        rows.append(x * min(1.0, 0.99 / (np.abs(x).max() + 1e-9)))
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def _crop(rng: np.random.Generator, pool: np.ndarray) -> np.ndarray:
    row, start = pool[rng.integers(len(pool))], rng.integers(pool.shape[1] - CROP + 1)
    return row[start : start + CROP] / np.float32(32767)


def spectral_loss(estimate: Tensor, target: Tensor, sample_rate: int, n_fft: int, hop: int, num_bands: int) -> Tensor:
    """Mean absolute difference of the log-mel spectra of two waveforms (B, N), plus that of their loud parts.

    It is deaf to phase on purpose: codes need not spend bits on it, and codes without it are easier to predict.
    """
    ours = log_mel(estimate, sample_rate, n_fft, hop, num_bands, fmin=0.0)
    with torch.no_grad():
        theirs = log_mel(target, sample_rate, n_fft, hop, num_bands, fmin=0.0)
    # Magnitudes to the power of 0.3 weigh what is heard above the details of near silence.
    return F.l1_loss(ours, theirs) + 3.0 * F.l1_loss((0.3 * ours).exp(), (0.3 * theirs).exp())


@torch.no_grad()
def start_as_vocoder(network: CodecNetwork) -> None:
    """Set weights with which the latent is the mean log power of each band, and the decoder plays it back.

    Training from random weights for a quarter of an hour does not get as far as these weights.
    """
    c = network.config
    hertz = torch.arange(c.long_window // 2 + 1) * (c.sample_rate / c.long_window)
    centres = (torch.arange(c.code_dim) + 0.5) * (c.sample_rate / 2 / c.code_dim)
    near = ((hertz - centres[:, None]).abs() <= c.sample_rate / 4 / c.code_dim).float()  # (code_dim, long bins)
    network.past_encoder.weight.zero_()
    network.past_encoder.weight[:, : near.shape[1]] = near / near.sum(dim=1, keepdim=True)
    network.past_encoder.bias.zero_()
    played = torch.cat([torch.arange(c.num_partials) + 0.5, torch.arange(c.hop + 1) * (c.num_partials / c.hop)])
    source = (played * (c.code_dim / c.num_partials)).long().clamp_max(c.code_dim - 1)
    rows = torch.cat([torch.arange(c.num_partials), torch.arange(2 * c.num_partials, 2 * c.num_partials + c.hop + 1)])
    network.past_decoder.weight.zero_()
    network.past_decoder.weight[rows, source] = 2.0  # features are a quarter of log power, loudness a half
    network.past_decoder.bias.zero_()
    network.past_decoder.bias[rows] = torch.cat([torch.full((c.num_partials,), 2.5), torch.full((c.hop + 1,), 1.5)])
    for layer in (network.to_latent, network.to_spectrum):
        layer.weight.zero_()
        layer.bias.zero_()


def make_codec(minutes: float, sounds: int, on_progress: Callable[[CodecNetwork, int, str], None]) -> CodecNetwork:
    """Train a codec for a time.

    Args:
        minutes: Of wall time, rendering the sounds not counted.
        sounds: How many segments of the demo world to render, and half again as many broad sounds.
        on_progress: Called now and then with the averaged network, the step and a line of news.

    Returns:
        The averaged network.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    world, broad = world_sounds(TRAIN_SEED, sounds)[1], broad_sounds(0, 3 * sounds // 2)
    network = CodecNetwork(CodecConfig())
    start_as_vocoder(network)
    rate, num_levels = network.config.sample_rate, network.config.num_codebooks
    quantiser = QuantiserTrainer(network)
    weights = [p for name, p in network.named_parameters() if name != "codebooks"]
    optimizer = torch.optim.AdamW(weights, lr=PEAK_RATE, betas=(0.8, 0.99), weight_decay=1e-3)
    clock, average, quantising, running = Clock(minutes), Average(network), False, 0.0

    for report in clock.steps(optimizer, PEAK_RATE, report_every=200):
        waveform = draw_batch(rng, world, broad)
        if not quantising and clock.progress() > BARE_SHARE:
            with torch.no_grad():
                seen = torch.cat([network.analyse(draw_batch(rng, world, broad)).flatten(0, 1) for _ in range(12)])
            quantiser.start(seen)
            quantising = True
        latent = network.analyse(waveform)
        commitment = latent.square().mean()  # until it is quantised, the latent is merely kept small
        if quantising:
            fewer = torch.from_numpy(rng.integers(1, num_levels + 1, BATCH))
            levels = torch.where(torch.from_numpy(rng.random(BATCH) < 0.25), fewer, num_levels)
            latent, commitment = quantiser(latent, levels)
        mel = spectral_loss(network.synthesise(latent), waveform, rate, *RESOLUTIONS[rng.integers(len(RESOLUTIONS))])
        loss = mel + (0.25 if quantising else 0.001) * commitment
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        average.update(network)
        average.tensors["codebooks"].copy_(network.codebooks.data)  # they are running means already
        running += 0.02 * (mel.item() - running)
        if report:
            share = (quantiser.counts / quantiser.counts.sum(1, keepdim=True)).clamp_min(1e-9)
            bits = [round(float(b), 2) for b in -(share * share.log2()).sum(1)]
            news = f"loss {running:.3f}, commitment {commitment.item():.3f}, bits per level {bits}"
            on_progress(average.of(network), clock.step, news)
    return average.of(network)


DECODER = ("from_latent.", "decoder.", "decoder_norm.", "to_spectrum.", "past_decoder.")
"""Beginnings of the names of the decoder's weights."""
DECODER_RATE = 2e-4


def refine_decoder(codec: TinyCodec, steps: int, sounds: int, on_progress: Callable[[int, str], None]) -> CodecNetwork:
    """Train the decoder of a finished codec further. Encoder and codebooks stay as they are, and so do all codes.

    It trains by steps and not by the clock: the same codec, steps and sounds give the same weights on the same machine.

    Args:
        codec: The codec; it is not changed.
        steps: How many.
        sounds: How many segments of the demo world to render, and half again as many broad sounds.
        on_progress: Called now and then with the step and a line of news.

    Returns:
        The averaged network.
    """
    rng = np.random.default_rng(1)  # other crops than those of `make_codec`, of the same sounds
    world, broad = world_sounds(TRAIN_SEED, sounds)[1], broad_sounds(0, 3 * sounds // 2)
    network = copy.deepcopy(codec.network)
    weights = [p.requires_grad_() for name, p in network.named_parameters() if name.startswith(DECODER)]
    optimizer = torch.optim.AdamW(weights, lr=DECODER_RATE, betas=(0.8, 0.99), weight_decay=1e-3)
    average, running = Average(network), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = DECODER_RATE * min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        waveform = draw_batch(rng, world, broad)
        with torch.no_grad():
            codes = network.quantise(network.analyse(waveform))
            # A quarter of the waveforms use fewer levels, as in `make_codec`.
            fewer = torch.from_numpy(rng.integers(1, codec.num_codebooks + 1, BATCH))
            levels = torch.where(torch.from_numpy(rng.random(BATCH) < 0.25), fewer, codec.num_codebooks)
            latent = torch.stack([network.lookup(c[None, :k])[0] for c, k in zip(codes, levels.tolist(), strict=True)])
        resolution = RESOLUTIONS[rng.integers(len(RESOLUTIONS))]
        loss = spectral_loss(network.synthesise(latent), waveform, codec.sample_rate, *resolution)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        average.update(network)
        running += (loss.item() - running) * max(0.02, 1 / (step + 1))
        if (step + 1) % 200 == 0:
            on_progress(step + 1, f"loss {running:.3f}")
    return average.of(network)


FINER_LEVELS, FINER_ROUNDS = 4, 40
"""Levels that "codec8" adds, and the rounds of k-means for each."""
FINER_DIRECTIONS, FINER_STEP = 12, 0.5
"""Directions of the latent that they refine, and the size of their entries as a share of the clusters' means."""
NEIGHBOURS = 4
"""Steps on either side from which the directions are guessed."""


@torch.no_grad()
def make_finer_levels(codec: TinyCodec, sounds: int, on_progress: Callable[[str], None]) -> Tensor:
    """Further levels for a finished codec: k-means on what its own leave of the sounds that it was trained on.

    What they leave is mostly noise, which nobody can guess from the coarse codes. The levels therefore refine only the
    directions of which most can be guessed, and in half steps, so that a wrong guess does less harm. Clusters of all
    that is left bring the sound nearer to the original (log-mel distance of unseen demo segments 0.341 instead of
    0.355, with the first four levels 0.375); but with the best guess of a small network in their place, it was no
    nearer to the sound with all levels than with the coarse ones alone, and with these levels 8 % nearer.

    Nothing of the codec changes. The same sounds give the same levels on the same machine; no clock is read.

    Args:
        codec: The codec.
        sounds: How many segments of the demo world to render, and half again as many broad sounds.
        on_progress: Called with a line of news after each level.

    Returns:
        (FINER_LEVELS, S, code_dim) float32.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    world, broad = world_sounds(TRAIN_SEED, sounds)[1], broad_sounds(0, 3 * sounds // 2)
    latent = torch.cat([codec.network.analyse(draw_batch(rng, world, broad)) for _ in range(max(1, sounds // 3))])
    coarse = codec.network.lookup(codec.network.quantise(latent))  # (M, T, code_dim)
    left = (latent - coarse).flatten(0, 1)
    directions = guessable_directions(coarse, latent - coarse, FINER_DIRECTIONS)  # (code_dim, FINER_DIRECTIONS)
    inside, books = left @ directions, []
    for level in range(FINER_LEVELS):
        entries = FINER_STEP * residual_clusters(inside, 1, codec.codebook_size, FINER_ROUNDS)[0][0]
        inside = inside - entries[torch.cdist(inside, entries).argmin(dim=1)]
        books.append(entries @ directions.T)
        share = float((left - (left @ directions - inside) @ directions.T).square().mean() / left.square().mean())
        on_progress(f"level {codec.num_codebooks + level + 1}: {100 * share:.1f} % of what the codec leaves is left")
    return torch.stack(books)


@torch.no_grad()
def guessable_directions(known: Tensor, wanted: Tensor, count: int) -> Tensor:
    """The directions in which most of a sequence can be guessed from another, linearly and from near steps.

    Args:
        known: (M, T, D) float32.
        wanted: (M, T, D) float32.
        count: How many directions.

    Returns:
        (D, count) float32, orthonormal: the principal directions of the guess.
    """
    steps, width = known.shape[1], (2 * NEIGHBOURS + 1) * known.shape[2] + 1
    squares, products = torch.zeros(width, width), torch.zeros(width, wanted.shape[2])
    for some, target in zip(known.split(500), wanted.split(500), strict=True):
        padded = F.pad(some, (0, 0, NEIGHBOURS, NEIGHBOURS))
        inputs = torch.cat([padded[:, i : i + steps] for i in range(2 * NEIGHBOURS + 1)], dim=-1).flatten(0, 1)
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
        squares += inputs.T @ inputs
        products += inputs.T @ target.flatten(0, 1)
    ridge = 1e-4 * squares.diagonal().mean() * torch.eye(width)
    weights = torch.linalg.solve((squares + ridge).double(), products.double())
    guessed = weights.T @ squares.double() @ weights  # (D, D): the guess's covariance, but for a factor
    return torch.linalg.eigh(guessed).eigenvectors.flip(1)[:, :count].float()
