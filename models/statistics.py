"""One streaming pass over the proxy set: weighted moments and Taylor sums of every block, summed over ranks.

Nothing is kept per token: each batch is reduced to sums in float64 as its gradients arrive, and then forgotten.
"""

from dataclasses import dataclass, fields

import torch
from einops import rearrange, reduce
from torch.nn import functional as F
from tqdm import tqdm

import utils
from utils import InputError


class Moments:
    """Running sums of weighted vectors x with token weights w, per group: S0 = sum w, S1 = sum w x, S2 = sum w x x^T.

    G groups of d dimensions; float64. The plain sums ``count`` and ``total`` (weights of one) give the mean.
    """

    def __init__(self, groups, width, device):
        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count, self.total = zeros(), zeros(groups, width)
        self.s0, self.s1, self.s2 = zeros(groups), zeros(groups, width), zeros(groups, width, width)

    def add(self, x, weight):
        """x: [G, n, d]; weight: [G, n], not negative. Sums and products are float64 whatever the dtype of x."""
        root = weight.sqrt().unsqueeze(-1)
        rooted = (x * root).double()
        self.count += x.shape[1]
        self.total += x.sum(1, dtype=torch.float64)
        self.s0 += weight.sum(1, dtype=torch.float64)
        self.s1 += (rooted * root).sum(1)
        _add_product(self.s2, rooted)

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

    def about(self, center):
        """sum w (x - c)(x - c)^T / sum w for c = ``center`` [G, d]: the weighted second moment about c, [G, d, d]."""
        cross = self.s1.unsqueeze(2) * center.unsqueeze(1)
        outer = center.unsqueeze(2) * center.unsqueeze(1)
        centred = self.s2 - cross - cross.transpose(1, 2) + self.s0[:, None, None] * outer
        return centred / self.s0.clamp(min=torch.finfo(torch.float64).tiny)[:, None, None]

    def all_reduce(self):
        for name, value in vars(self).items():
            setattr(self, name, utils.all_reduce_sum(value))


def _add_product(total, x):
    """total [G, d, d] += x^T x for x [G, n, d]; it is symmetric, so blocks above the diagonal are copied."""
    size = 256
    for i in range(0, x.shape[-1], size):
        rows, before = x[..., i : i + size], x[..., : i + size]
        block = rows.mT @ before
        total[:, i : i + size, : i + size] += block
        total[:, :i, i : i + size] += block[..., :i].mT


@dataclass
class BlockStatistics:
    """What the proxy set says of one block. H heads of width d, M hidden units, all sums over tokens, float64.

    ``theta_*`` weight a token by theta = mean |g f| (the paper's token importance), ``grad_*`` by |g|^2, for g the
    gradient of the objective at that feature. z is the attention output of a head, before proj. The keys of ``grad_k``
    are centred in every image by the mean of its own keys.
    """

    taylor_attn: torch.Tensor  # [3, H, d] sum of |g f| for q, k and v
    hessian_attn: torch.Tensor  # [3, H, d] sum of (g f)^2
    taylor_mlp: torch.Tensor  # [M] sum of |g a|
    hessian_mlp: torch.Tensor  # [M] sum of (g a)^2
    theta_q: Moments | None = None
    theta_k: Moments | None = None
    theta_v: Moments | None = None
    grad_q: Moments | None = None
    grad_k: Moments | None = None
    grad_z: Moments | None = None
    attn_gram: torch.Tensor | None = None  # [D, D] sum of go go^T, go the gradient at the output of proj
    mlp_gram: torch.Tensor | None = None  # [D, D] the same at the output of fc2
    hidden: Moments | None = None  # one group of M: the hidden vector a, tokens weighted by |dC/da|^2

    @classmethod
    def zeros(cls, block, device, moments, hidden):
        """All sums at zero for a PrefixBlock at its present widths."""
        heads, width, units, dim = block.num_heads, block.attn_width, block.mlp_width, block.mlp.fc2.out_features

        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.float64, device=device)

        sums = cls(zeros(3, heads, width), zeros(3, heads, width), zeros(units), zeros(units))
        if moments:
            for field in fields(cls):
                if field.name.startswith(("theta_", "grad_")):
                    setattr(sums, field.name, Moments(heads, width, device))
            sums.attn_gram = zeros(dim, dim)
        if hidden:
            sums.hidden, sums.mlp_gram = Moments(1, units, device), zeros(dim, dim)
        return sums

    def all_reduce(self):
        """Sum over ranks, in place."""
        for name, value in vars(self).items():
            if isinstance(value, Moments):
                value.all_reduce()
            elif value is not None:
                setattr(self, name, utils.all_reduce_sum(value))


class _BlockTap:
    """Hooks on the linear layers of one block that add each batch to its BlockStatistics during the backward pass."""

    def __init__(self, block, device, moments, hidden):
        self.block, self.moments, self.hidden = block, moments, hidden
        self.sums = BlockStatistics.zeros(block, device, moments, hidden)
        self.handles = []
        if block.attn_width:
            self.handles.append(block.attn.qkv.register_forward_hook(self._on_qkv))
            if moments:
                self.handles.append(block.attn.proj.register_forward_hook(self._on_proj))
        if block.mlp_width:
            self.handles.append(block.mlp.fc2.register_forward_hook(self._on_fc2))

    def remove(self):
        for handle in self.handles:
            handle.remove()

    def _heads(self, tensor):
        return rearrange(tensor.double(), "b t (h d) -> h (b t) d", h=self.block.num_heads)

    def _on_qkv(self, _module, _inputs, output):
        kept = output.detach()
        output.register_hook(lambda gradient: self._add_qkv(kept, gradient))

    def _add_qkv(self, qkv, gradient):
        for index, (f, g) in enumerate(zip(qkv.chunk(3, dim=-1), gradient.chunk(3, dim=-1), strict=True)):
            name, f, g = "qkv"[index], self._heads(f), self._heads(g)
            taylor = (f * g).abs()
            self.sums.taylor_attn[index] += taylor.sum(1)
            self.sums.hessian_attn[index] += taylor.square().sum(1)
            if self.moments:
                getattr(self.sums, f"theta_{name}").add(f, taylor.mean(-1))
                if name == "q":
                    self.sums.grad_q.add(f, g.square().sum(-1))
                if name == "k":
                    # The softmax ignores what is common to all keys of an image: only what differs counts.
                    tokens = f.unflatten(1, qkv.shape[:2])
                    self.sums.grad_k.add((tokens - tokens.mean(2, keepdim=True)).flatten(1, 2), g.square().sum(-1))

    def _on_proj(self, _module, inputs, output):
        kept = inputs[0].detach()
        inputs[0].register_hook(
            lambda gradient: self.sums.grad_z.add(self._heads(kept), self._heads(gradient).square().sum(-1))
        )
        output.register_hook(lambda gradient: _add_gram(self.sums.attn_gram, gradient))

    def _on_fc2(self, _module, inputs, output):
        kept = inputs[0].detach()
        inputs[0].register_hook(lambda gradient: self._add_hidden(kept, gradient))
        if self.hidden:
            output.register_hook(lambda gradient: _add_gram(self.sums.mlp_gram, gradient))

    def _add_hidden(self, a, gradient):
        a, gradient = rearrange(a.float(), "b t m -> (b t) m"), rearrange(gradient.float(), "b t m -> (b t) m")
        taylor = (a * gradient).abs()
        self.sums.taylor_mlp += reduce(taylor, "n m -> m", "sum")
        self.sums.hessian_mlp += reduce(taylor.square(), "n m -> m", "sum")
        if self.hidden:
            self.sums.hidden.add(a.unsqueeze(0), gradient.square().sum(-1).unsqueeze(0))


def _add_gram(total, gradient):
    """total [D, D] += sum of g g^T over the tokens of ``gradient`` [B, T, D]."""
    flat = rearrange(gradient.double(), "b t d -> (b t) d")
    total += flat.T @ flat


def collect_statistics(model, batches, objective, device, moments=True, hidden=False, amp="none"):
    """Sums over the proxy set of every block of a super-network at its present widths (docs/stage1.md).

    Args:
        batches: iterable of (images [B, C, H, W], labels [B], positions [B] in the proxy set): this rank's share.
        objective: function (model, images, labels, positions) -> scalar, a sum over images.
        moments: also collect what the bases need.
        hidden: also collect what compensation needs, M x M float64 numbers per block.
    Returns a list of L BlockStatistics, summed over ranks. Raises InputError if an activation or gradient is not
    finite, and if no image was seen. Parameters get no gradient; the training mode is put back.
    """
    training = model.training
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    taps = [_BlockTap(block, device, moments, hidden) for block in model.blocks]
    seen = torch.zeros((), device=device)
    try:
        for images, labels, positions in tqdm(
            batches, desc="statistics", disable=None if utils.is_main() else True, leave=False
        ):
            images = images.to(device).requires_grad_()
            with utils.autocast(device, amp):
                value = objective(model, images, labels.to(device), positions)
            value.backward()
            seen += len(images)
    finally:
        for tap in taps:
            tap.remove()
        for parameter, flag in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)
        model.train(training)
    if utils.all_reduce_sum(seen) == 0:
        raise InputError("there is no proxy image that can be read; --proxy_samples counts them")
    for index, tap in enumerate(taps):
        tap.sums.all_reduce()
        if not all(torch.isfinite(s).all() for s in (tap.sums.taylor_attn, tap.sums.taylor_mlp)):
            raise InputError(
                f"block {index}: activations or gradients on the proxy set are NaN or infinite: check the weights"
            )
    return [tap.sums for tap in taps]


# ------------------------------------------------------------------------------------------ objectives


def label_objective(model, images, labels, positions):
    """The paper's: the sum over images of the logit of the true class."""
    return model(images).gather(1, labels[:, None]).sum()


def feature_objective(model, images, labels, positions):
    """Without labels or class head: the pooled feature times a random unit vector, one for each proxy image.

    The squared gradient then estimates how far a feature moves the network's output, |d output|^2 / D.
    """
    feature = model.forward_head(model.forward_features(images), pre_logits=True)
    vectors = [torch.randn(feature.shape[1], generator=utils.keyed_generator(17, int(p))) for p in positions]
    return (feature * F.normalize(torch.stack(vectors)).to(feature)).sum()


OBJECTIVES = {"label": label_objective, "feature": feature_objective}
