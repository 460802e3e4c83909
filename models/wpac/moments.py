"""Streaming weighted moments: sums over tokens in float64, of which nothing is kept per token."""

import torch

import utils


class SymmetricSum:
    """Running sum of x x^T over tokens, for G groups of d dimensions, float64. Holds only blocks up to the diagonal."""

    SIZE = 32

    def __init__(self, groups, width, device):
        self.rows = [
            torch.zeros(
                groups, min(self.SIZE, width - i), min(i + self.SIZE, width), dtype=torch.float64, device=device
            )
            for i in range(0, width, self.SIZE)
        ]
        self.shape = (groups, width, width)

    def add(self, x):
        """x: [G, n, d], float64."""
        for i, row in enumerate(self.rows):
            start, end = i * self.SIZE, i * self.SIZE + row.shape[1]
            row.baddbmm_(x[..., start:end].mT, x[..., :end])

    def dense(self):
        """The sum, [G, d, d]."""
        dense = self.rows[0].new_zeros(self.shape) if self.rows else torch.zeros(self.shape, dtype=torch.float64)
        for i, row in enumerate(self.rows):
            start, end = i * self.SIZE, i * self.SIZE + row.shape[1]
            dense[:, start:end, :end] = row
            dense[:, :start, start:end] = row[..., :start].mT
        return dense

    def all_reduce(self):
        self.rows = [utils.all_reduce_sum(row) for row in self.rows]


class Moments:
    """Running sums of vectors x with token weights w: S0 = sum w, S1 = sum w x, S2 = sum w x x^T.

    They are kept for G groups of d dimensions, in float64. ``count`` and ``total``, the sums without weights, give the
    mean.
    """

    def __init__(self, groups, width, device):
        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count, self.total = zeros(), zeros(groups, width)
        self.s0, self.s1, self.s2 = zeros(groups), zeros(groups, width), SymmetricSum(groups, width, device)

    def add(self, x, weight):
        """x: [G, n, d]; weight: [G, n], not negative; both float64."""
        self.count += x.shape[1]
        self.total += x.sum(1)
        self.s0 += weight.sum(1)
        self.s1 += (weight.unsqueeze(1) @ x).squeeze(1)
        self.s2.add(x * weight.sqrt().unsqueeze(-1))

    @property
    def mean(self):
        """The unweighted mean over all tokens, [G, d]."""
        return self.total / self.count.clamp(min=1)

    @property
    def weighted_mean(self):
        """sum w x / sum w, [G, d]."""
        return self.s1 / self.s0.clamp(min=torch.finfo(torch.float64).tiny)[:, None]

    @property
    def second_moment(self):
        """sum w x x^T / sum w, [G, d, d]."""
        return self.about(torch.zeros_like(self.s1))

    @property
    def covariance(self):
        """sum w (x - mu)(x - mu)^T / sum w about the unweighted mean mu, [G, d, d]. With w = theta, the token
        importance, this is the covariance of WPAC (paper), divided by sum theta."""
        return self.about(self.mean)

    def about(self, center):
        """sum w (x - c)(x - c)^T / sum w, [G, d, d], for c = ``center`` [G, d]."""
        moment = self.s2.dense()
        for first, second in ((self.s1, center), (center, self.s1), (-self.s0[:, None] * center, center)):
            moment.baddbmm_(first.unsqueeze(2), second.unsqueeze(1), alpha=-1)
        return moment.div_(self.s0.clamp(min=torch.finfo(torch.float64).tiny)[:, None, None])

    def all_reduce(self):
        for name in ("count", "total", "s0", "s1"):
            setattr(self, name, utils.all_reduce_sum(getattr(self, name)))
        self.s2.all_reduce()
