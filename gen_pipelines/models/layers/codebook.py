"""Vector quantisation: the nearest of K vectors, and how the K vectors follow what is quantised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ranks import num_ranks, rank, sum_over_ranks

_CHUNK = 2**18  # distances at once, 1 MB in float32: they stay in the cache between the product and its minimum
_LANES = 64


@dataclass
class QuantizerOutput:
    """What a `VectorQuantizer` gives.

    Attributes:
        quantized: the nearest vectors; gradients pass through to the input as they are, shape and dtype of the input.
        codes: their numbers, (B, H, W) or (B, N), int64.
        loss: of every sample, (B,), float32: the commitment, and in mode "loss" the codebook's, means over positions and dimensions.
        perplexity: exp of the entropy of the codes in this batch on this rank, at most min(K, positions in the batch).
    """

    quantized: Tensor
    codes: Tensor
    loss: Tensor
    perplexity: Tensor


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """argmin_k |x - e_k|^2 = argmin_k (|e_k|^2 - 2 x e_k), computed in float32 in chunks: no tensor of (N, K) exists.

    Args:
        x: (N, d). codebook: (K, d).
    Returns: (N,), int64. Where two vectors are equally near, one of the two.

    The minimum over K is taken lane by lane first (K / 64 whole vectors of 64), which a processor does many at once, then over the 64
    lanes, then over the K / 64 entries of the lane that has it: an index for every element is never carried along.
    """
    count = len(codebook)
    transposed, squares = codebook.t().contiguous(), codebook.square().sum(1)
    lanes = _LANES if x.device.type == "cpu" and count % _LANES == 0 and count > _LANES else 0
    codes = torch.empty(len(x), dtype=torch.long, device=x.device)
    rows = max(_CHUNK // count, 64) if x.device.type == "cpu" else max(2**22 // count, 1024)
    for start in range(0, len(x), rows):
        distances = torch.addmm(squares, x[start : start + rows], transposed, alpha=-2)                # (n, K)
        if not lanes:
            codes[start : start + rows] = distances.argmin(1)
            continue
        folded = distances.view(len(distances), -1, lanes)                                             # (n, K / 64, 64)
        lane = folded.amin(1).argmin(1)                                                                # (n,)
        block = folded.gather(2, lane.view(-1, 1, 1).expand(-1, folded.shape[1], 1)).squeeze(2).argmin(1)
        codes[start : start + rows] = block * lanes + lane
    return codes


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _StraightThrough(torch.autograd.Function):
    """The value of one tensor, exactly, with its gradient passed to another; z + (e - z) would round."""

    @staticmethod
    def forward(ctx: object, z: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class VectorQuantizer(nn.Module):
    """Replaces vectors by the nearest of K learned ones, and passes gradients straight through.

    The learned vectors follow one of two rules:

    - "ema": e_k = m_k / n_k, where n_k and m_k are exponential moving averages of how many vectors chose k and of their sum. A forward pass
      with gradients in training mode only collects counts and sums; `after_update`, which the trainer calls after each update of the
      optimiser, adds them over all ranks and moves the averages once, however many micro-batches there were.
    - "loss": |sg[z] - e|^2 is part of the loss, and the vectors are parameters.

    In both, codes that are hardly used are revived: set to vectors of the present batch, with their averages. `initialize` puts the first
    vectors where the data is; with zero counts unused vectors would be flung away by a division by almost nothing.

    Args:
        num_embeddings: K.
        embedding_dim: d.
        update: "ema" or "loss".
        decay: of the averages.
        beta: weight of the commitment |z - sg[e]|^2.
        revive_below: a code is dead when its share of the use (averaged) falls below this part of 1 / K; 0 revives none.
        eps: of the Laplace smoothing of the counts. What is smoothed is used and not stored, or it would add up.

    Buffers: `codebook` (K, d) (a parameter in mode "loss"), `cluster_size` (K,), `cluster_sum` (K, d), `usage` (K,) counts of the present
    epoch, `epoch`, `updates`, `initialized`.

    References: van den Oord et al. 2017, eqs. 1 to 3 and appendix A.1, https://arxiv.org/abs/1711.00937; Razavi et al. 2019, section 2.1,
    https://arxiv.org/abs/1906.00446; Dhariwal et al. 2020, section 3.1, https://arxiv.org/abs/2005.00341 (revival)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        update: str = "ema",
        decay: float = 0.99,
        beta: float = 0.25,
        revive_below: float = 0.03,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if update not in ("ema", "loss"):
            raise ValueError(f"VectorQuantizer: update {update!r} is none of ema, loss.")
        if num_embeddings < 2 or embedding_dim < 1:
            raise ValueError(f"VectorQuantizer: at least 2 vectors of 1 dimension, got {num_embeddings} of {embedding_dim}.")
        if not 0 <= decay < 1 or beta < 0 or not 0 <= revive_below < 1:
            raise ValueError(f"VectorQuantizer: decay {decay} and revive_below {revive_below} lie in [0, 1), beta {beta} is 0 or more.")
        self.num_embeddings, self.embedding_dim, self.update = num_embeddings, embedding_dim, update
        self.decay, self.beta, self.revive_below, self.eps = decay, beta, revive_below, eps
        start = torch.randn(num_embeddings, embedding_dim)
        if update == "loss":
            self.codebook = nn.Parameter(start)
        else:
            self.register_buffer("codebook", start)
        self.register_buffer("cluster_size", torch.ones(num_embeddings))
        self.register_buffer("cluster_sum", start.clone())
        self.register_buffer("usage", torch.zeros(num_embeddings))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.long))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        # collected between two updates, empty at every checkpoint
        self.register_buffer("_counts", torch.zeros(num_embeddings), persistent=False)
        self.register_buffer("_sums", torch.zeros(num_embeddings, embedding_dim), persistent=False)
        self._recent: Tensor | None = None

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantises.

        Args:
            z: (B, d, H, W), or (B, N, d).
        """
        flat, shape = self._flatten(z)
        with torch.autocast(z.device.type, enabled=False):
            vectors, book = _wide(flat), _wide(self.codebook)                                          # (N, d), (K, d)
            codes = nearest(vectors.detach(), book.detach())                                           # (N,)
            chosen = F.embedding(codes, book)                                                          # (N, d)
            # from the vectors before the gradient is passed straight through: afterwards their difference is zero
            loss = self.beta * (vectors - chosen.detach()).square()
            if self.update == "loss":
                loss = loss + (vectors.detach() - chosen).square()
            loss = loss.reshape(len(z), -1).mean(1)                                                    # (B,)
            counts = vectors.new_zeros(self.num_embeddings).index_add_(0, codes, vectors.new_ones(len(codes)))
            if self.training and torch.is_grad_enabled():
                self._collect(vectors.detach(), codes, counts, len(z))
            share = counts / counts.sum()
            perplexity = torch.exp(-torch.special.xlogy(share, share).sum())
        quantized = _StraightThrough.apply(z, self._restore(chosen.detach(), z))
        return QuantizerOutput(quantized, codes.view(shape), loss, perplexity)

    def encode(self, z: Tensor) -> Tensor:
        """The codes of z, (B, H, W) or (B, N); nothing is collected."""
        flat, shape = self._flatten(z)
        return nearest(_wide(flat.detach()), _wide(self.codebook.detach())).view(shape)

    def decode(self, codes: Tensor) -> Tensor:
        """The vectors of codes: (B, H, W) to (B, d, H, W), (B, N) to (B, N, d).

        Raises:
            ValueError: a code that there is not.
        """
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.num_embeddings:
            found = f"{int(codes.min())} to {int(codes.max())}"
            raise ValueError(f"VectorQuantizer: codes lie from 0 to {self.num_embeddings - 1}, got {found}.")
        vectors = F.embedding(codes, self.codebook)
        return vectors.permute(0, 3, 1, 2) if codes.ndim == 3 else vectors

    # ------------------------------------------------------------------------------------------------------------------- learning

    @torch.no_grad()
    def initialize(self, z: Tensor, seed: int = 0) -> None:
        """Sets the vectors to K of the data's, once: a quantiser that has been initialised (or loaded) stays what it is.

        Args:
            z: as in `forward`, of the first pictures; every rank gets what rank 0 chose.
            seed: of the choice.
        """
        if self.initialized:
            return
        vectors = _wide(self._flatten(z)[0])
        generator = torch.Generator().manual_seed(seed)
        picked = torch.cat([torch.randperm(len(vectors), generator=generator) for _ in range(-(-self.num_embeddings // len(vectors)))])
        start = vectors[picked[: self.num_embeddings].to(vectors.device)]
        if len(vectors) < self.num_embeddings:  # the same vector twice would never be told apart
            start = start + 0.01 * vectors.std() * torch.randn(start.shape, generator=generator).to(start)
        if num_ranks() > 1:
            torch.distributed.broadcast(start, 0)
        self._put(torch.ones_like(self.cluster_size, dtype=torch.bool), start, max(len(vectors) / self.num_embeddings, 1.0))
        self.initialized.fill_(True)

    @torch.no_grad()
    def after_update(self) -> None:
        """Moves the averages by what was collected since the last update, on all ranks; then revives dead codes."""
        if self._recent is None:
            return
        counts, sums = sum_over_ranks(self._counts), sum_over_ranks(self._sums)
        self.usage.add_(counts)
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.cluster_sum.lerp_(sums, 1 - self.decay)
        if self.update == "ema":
            total = self.cluster_size.sum()
            smoothed = (self.cluster_size + self.eps) / (total + self.num_embeddings * self.eps) * total
            torch.div(self.cluster_sum, smoothed[:, None], out=self.codebook)
        if self.revive_below:
            self._revive()
        self.updates.add_(1)
        self._counts.zero_()
        self._sums.zero_()
        self._recent = None

    def _collect(self, vectors: Tensor, codes: Tensor, counts: Tensor, batch: int) -> None:
        self._counts.add_(counts)
        self._sums.index_add_(0, codes, vectors)
        self._recent = vectors.reshape(batch, -1, self.embedding_dim)

    def _revive(self) -> None:
        """Dead codes become vectors of the last batch of all ranks, the same choice for any division of that batch over ranks."""
        mean = self.cluster_size.mean()
        dead = self.cluster_size < self.revive_below * mean
        if not dead.any():
            return
        here, each = self._recent.shape[:2]
        generator = torch.Generator().manual_seed(int(self.updates))
        picked = torch.randint(here * num_ranks() * each, (self.num_embeddings,), generator=generator).to(dead.device)
        sample, place = picked // each, picked % each
        mine = sample % num_ranks() == rank()  # rank r has every num_ranks-th sample of the whole batch
        found = self._recent[(sample // num_ranks()) * mine, place] * mine[:, None]
        self._put(dead, sum_over_ranks(found), float(mean))

    def _put(self, which: Tensor, vectors: Tensor, size: float) -> None:
        """Sets some codes, and with them all that is averaged: a vector alone would be undone by the next update."""
        mask = which[:, None]
        self.codebook.copy_(torch.where(mask, vectors.to(self.codebook.dtype), self.codebook))
        self.cluster_size.masked_fill_(which, size)
        self.cluster_sum.copy_(torch.where(mask, vectors * size, self.cluster_sum))

    # ---------------------------------------------------------------------------------------------------------------- what is in use

    @torch.no_grad()
    def start_epoch(self, epoch: int) -> None:
        """Begins a new count of the codes' use, if the epoch is a new one."""
        if epoch != int(self.epoch):
            self.usage.zero_()
            self.epoch.fill_(epoch)

    def epoch_perplexity(self) -> Tensor:
        """exp of the entropy of the codes used since the epoch began, on all ranks: unlike a batch's, not bounded by the batch."""
        share = self.usage / self.usage.sum().clamp_min(1)
        return torch.exp(-torch.special.xlogy(share, share).sum())

    def epoch_used(self) -> Tensor:
        """The part of the codes used since the epoch began."""
        return (self.usage > 0).float().mean()

    # ------------------------------------------------------------------------------------------------------------------------ shapes

    def _flatten(self, z: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        if z.ndim == 4 and z.shape[1] == self.embedding_dim:
            return z.permute(0, 2, 3, 1).reshape(-1, self.embedding_dim), (z.shape[0], *z.shape[2:])
        if z.ndim == 3 and z.shape[2] == self.embedding_dim:
            return z.reshape(-1, self.embedding_dim), tuple(z.shape[:2])
        raise ValueError(
            f"VectorQuantizer: vectors of {self.embedding_dim} dimensions come as (B, {self.embedding_dim}, H, W) or "
            f"(B, N, {self.embedding_dim}); got {tuple(z.shape)}."
        )

    def _restore(self, vectors: Tensor, z: Tensor) -> Tensor:
        vectors = vectors.to(z.dtype)
        if z.ndim == 3:
            return vectors.view(z.shape)
        return vectors.view(z.shape[0], *z.shape[2:], self.embedding_dim).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, update={self.update!r}"
