"""Streaming weighted moments: sums over tokens in float64, of which nothing is kept per token."""

import copy

import torch

import utils

# Rows of a block of a SymmetricSum, at least: narrow blocks save arithmetic, wide ones launches. And of a wide sum on a
# CPU a 32nd, since every block reads what stands before the diagonal.
ROWS = {"cpu": 32, "cuda": 256}


def zeros(*shape, device):
    return torch.zeros(shape, dtype=torch.float64, device=device)


class Sums:
    """Sums over tokens: every member is a tensor, Sums itself, or None."""

    def all_reduce(self):
        """Sum over ranks, in place."""
        for name, value in vars(self).items():
            if isinstance(value, Sums):
                value.all_reduce()
            elif value is not None:
                setattr(self, name, utils.all_reduce(value))


class SymmetricSum(Sums):
    """Running sum of x x^T over tokens, for G groups of d dimensions, float64. Holds only blocks up to the diagonal."""

    def __init__(self, groups, width, device):
        self.rows = []  # entries [start:end, :end] of the sum, for every ``size`` of its rows
        size = max(ROWS[torch.device(device).type], width // 32)
        for start in range(0, width, size):
            end = min(start + size, width)
            self.rows.append(zeros(groups, end - start, end, device=device))

    def add(self, x):
        """x: [G, n, d], float64."""
        for row in self.rows:
            height, end = row.shape[1:]
            row.baddbmm_(x[..., end - height : end].mT, x[..., :end])

    def dense(self):
        """The sum, [G, d, d]."""
        groups, _, width = self.rows[-1].shape
        dense = self.rows[-1].new_empty(groups, width, width)
        for row in self.rows:
            height, end = row.shape[1:]
            start = end - height
            dense[:, start:end, :end] = row
            dense[:, :start, start:end] = row[..., :start].mT
        return dense

    def all_reduce(self):
        self.rows = [utils.all_reduce(row) for row in self.rows]

    def __add__(self, other):
        both = copy.copy(self)
        both.rows = [row + others for row, others in zip(self.rows, other.rows, strict=True)]
        return both


class Moments(Sums):
    """Running sums of vectors x with token weights w, S0 = sum w, S1 = sum w x, S2 = sum w x x^T, for G groups of d
    dimensions, in float64. ``count`` and ``total``, the sums without weights, give the mean."""

    def __init__(self, groups, width, device):
        self.count, self.total = zeros(device=device), zeros(groups, width, device=device)
        self.s0, self.s1 = zeros(groups, device=device), zeros(groups, width, device=device)
        self.s2 = SymmetricSum(groups, width, device)

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
        columns = torch.stack((self.s1, center, -self.s0[:, None] * center), 2)
        moment = self.s2.dense().baddbmm_(columns, torch.stack((center, self.s1, center), 1), alpha=-1)
        return moment.div_(self.s0.clamp(min=torch.finfo(torch.float64).tiny)[:, None, None])

    def __add__(self, other):
        both = copy.copy(self)
        vars(both).update({name: value + getattr(other, name) for name, value in vars(self).items()})
        return both


class Halves(Sums):
    """Moments of the proxy images at even and at odd positions, so that one half can judge what the other says."""

    def __init__(self, groups, width, device):
        self.even, self.odd = (Moments(groups, width, device) for _ in range(2))

    @property
    def apart(self):
        return self.even, self.odd

    @property
    def together(self):
        """Moments of all images."""
        return self.even + self.odd
