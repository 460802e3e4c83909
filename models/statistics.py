"""One streaming pass over the proxy set: weighted moments and Taylor sums of every block, summed over ranks.

Nothing is kept per token: each batch is reduced to sums in float64 as its gradients arrive, and then forgotten. It is
cast to float64 a few images at a time, so that what is needed beyond the network and the sums does not grow with it.
"""

from dataclasses import dataclass, fields

import torch
from einops import rearrange
from torch.nn import functional as F

import utils
from models.supernet import blocks_of
from utils import InputError

# Tokens that are in float64 at a time, or one image if that has more.
TOKENS_AT_ONCE = 256


class SymmetricSum:
    """Running sum of x x^T over tokens, G groups of d x d, float64. Only blocks up to the diagonal are held."""

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
        """The whole sum, [G, d, d]."""
        whole = self.rows[0].new_zeros(self.shape) if self.rows else torch.zeros(self.shape, dtype=torch.float64)
        for i, row in enumerate(self.rows):
            start, end = i * self.SIZE, i * self.SIZE + row.shape[1]
            whole[:, start:end, :end] = row
            whole[:, :start, start:end] = row[..., :start].mT
        return whole

    def all_reduce(self):
        self.rows = [utils.all_reduce_sum(row) for row in self.rows]


class Moments:
    """Running sums of weighted vectors x with token weights w, per group: S0 = sum w, S1 = sum w x, S2 = sum w x x^T.

    G groups of d dimensions; float64. The plain sums ``count`` and ``total`` (weights of one) give the mean.
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

    def about(self, center):
        """sum w (x - c)(x - c)^T / sum w for c = ``center`` [G, d]: the weighted second moment about c, [G, d, d]."""
        moment = self.s2.dense()
        for first, second in ((self.s1, center), (center, self.s1), (-self.s0[:, None] * center, center)):
            moment.baddbmm_(first.unsqueeze(2), second.unsqueeze(1), alpha=-1)
        return moment.div_(self.s0.clamp(min=torch.finfo(torch.float64).tiny)[:, None, None])

    def all_reduce(self):
        for name in ("count", "total", "s0", "s1"):
            setattr(self, name, utils.all_reduce_sum(getattr(self, name)))
        self.s2.all_reduce()


@dataclass
class BlockStatistics:
    """What the proxy set says of one block. H heads of width d, M hidden units, all sums over tokens, float64.

    ``theta_*`` weight a token by theta = mean |g f| (the paper's token importance), ``grad_*`` by |g|^2, for g the
    gradient of the objective at that feature. z is the attention output of a head, before proj. The keys of ``grad_k``
    are centred in every image (or window) by the mean of its own keys. Of attention that is kept or dropped whole only
    z is measured: there ``taylor_attn`` and ``hessian_attn`` have z in the place of v and nothing for q and k.
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
    joint_z: Moments | None = None  # one group of H d: z of all heads, tokens weighted by |go|, go as below
    attn_gram: SymmetricSum | None = None  # [D, D] sum of go go^T, go the gradient at the output of proj
    mlp_gram: SymmetricSum | None = None  # [D, D] the same at the output of fc2
    hidden: Moments | None = None  # one group of M: the hidden vector a, tokens weighted by |dC/da|^2
    attn_mean: torch.Tensor | None = None  # [D + 1] sum of what attention adds to the residual stream, and tokens
    mlp_mean: torch.Tensor | None = None  # [D + 1] the same of the MLP; of branches that end in a norm only

    @classmethod
    def zeros(cls, block, device, moments, hidden):
        """All sums at zero for a PrefixBlock at its present widths."""
        heads, width, units, dim = block.num_heads, block.attn_width, block.mlp_width, block.output("mlp").out_features

        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.float64, device=device)

        sums = cls(zeros(3, heads, width), zeros(3, heads, width), zeros(units), zeros(units))
        if moments:
            wanted = ("grad_z",) if block.parts[0].whole else ("theta_", "grad_")
            for name in (field.name for field in fields(cls) if field.name.startswith(wanted)):
                setattr(sums, name, Moments(heads, width, device))
            sums.attn_gram = SymmetricSum(1, dim, device)
            if not block.parts[0].whole:
                sums.joint_z = Moments(1, heads * width, device)
        if hidden:
            sums.hidden, sums.mlp_gram = Moments(1, units, device), SymmetricSum(1, dim, device)
        if moments and block.kind.post_norm:
            sums.attn_mean, sums.mlp_mean = zeros(dim + 1), zeros(dim + 1)
        return sums

    def mean_gram(self, branch):
        """E[g g^T] for g the gradient at the output of ``branch``, 'attn' or 'mlp'; [D, D]."""
        total, seen = {"attn": (self.attn_gram, self.grad_z), "mlp": (self.mlp_gram, self.hidden)}[branch]
        return total.dense()[0] / seen.count

    def all_reduce(self):
        """Sum over ranks, in place."""
        for name, value in vars(self).items():
            if isinstance(value, (Moments, SymmetricSum)):
                value.all_reduce()
            elif value is not None:
                setattr(self, name, utils.all_reduce_sum(value))


class _BlockTap:
    """Hooks on the layers of one block that add each batch to its BlockStatistics during the backward pass.

    What they keep until then, and let go at once, is what autograd keeps too: q, k, v, the attention output and what
    goes into the activation function, from which the hidden vector is computed again.
    """

    def __init__(self, block, device, moments, hidden):
        self.block, self.moments, self.hidden = block, moments, hidden
        self.sums = BlockStatistics.zeros(block, device, moments, hidden)
        self.handles, self.kept = [], {}
        (attention, mlp), (has_attn, has_mlp) = block.parts, (block.attn_width, block.mlp_width)
        if has_attn and not attention.whole:
            self._on(block.attn.qkv, self._on_qkv)
        if has_attn and (moments or attention.whole):
            self._on(block.output("attn"), self._on_attention_output)
        if has_mlp:
            for name in mlp.inputs:
                self._on(getattr(block.mlp, name), self._on_mlp_input, name)
            self._on(block.output("mlp"), self._on_mlp_output)
        for branch in ("attn", "mlp") if self.sums.attn_mean is not None else ():
            self._on(getattr(block, "norm1" if branch == "attn" else "norm2"), self._on_end, branch)

    def _on(self, module, hook, *arguments):
        self.handles.append(module.register_forward_hook(lambda _m, given, out: hook(*arguments, given[0], out)))

    def remove(self):
        for handle in self.handles:
            handle.remove()

    def _on_qkv(self, _given, output):
        self.kept["qkv"] = output.detach()
        output.register_hook(lambda gradient: self._add_qkv(self.kept.pop("qkv"), gradient))

    def _on_attention_output(self, z, output):
        self.kept["z"] = z.detach()
        z.register_hook(lambda gradient: self._add_z(self.kept.pop("z"), gradient))
        if self.moments:
            output.register_hook(self._add_output)

    def _on_mlp_input(self, name, _given, output):
        self.kept[name] = output.detach()

    def _on_mlp_output(self, hidden, output):
        names = self.block.parts[1].inputs
        hidden.register_hook(lambda gradient: self._add_hidden([self.kept.pop(name) for name in names], gradient))
        if self.hidden:
            output.register_hook(lambda gradient: _add_gram(self.sums.mlp_gram, gradient))

    def _on_end(self, branch, _given, output):
        total = getattr(self.sums, f"{branch}_mean")
        flat = output.detach().flatten(0, -2)
        total[:-1] += flat.sum(0, dtype=torch.float64)
        total[-1] += len(flat)

    def _heads(self, tensor):
        return rearrange(tensor.double(), "b t (h d) -> h (b t) d", h=self.block.num_heads)

    def _add_qkv(self, qkv, gradient):
        for features, gradients in _parts(qkv, gradient):
            pairs = zip("qkv", features.chunk(3, dim=-1), gradients.chunk(3, dim=-1), strict=True)
            for index, (name, f, g) in enumerate(pairs):
                self._add_feature(index, name, self._heads(f), self._heads(g), len(features))

    def _add_feature(self, index, name, f, g, images):
        """q, k or v of a few images and its gradient, [H, n, d] each, n the tokens of all images."""
        taylor = (f * g).abs()
        self.sums.taylor_attn[index] += taylor.sum(1)
        self.sums.hessian_attn[index] += taylor.square().sum(1)
        if self.moments:
            getattr(self.sums, f"theta_{name}").add(f, taylor.mean(-1))
            if name == "q":
                self.sums.grad_q.add(f, g.square().sum(-1))
            if name == "k":
                # The softmax ignores what is common to all keys of an image: only what differs counts.
                tokens = f.unflatten(1, (images, -1))
                self.sums.grad_k.add((tokens - tokens.mean(2, keepdim=True)).flatten(1, 2), g.square().sum(-1))

    def _add_output(self, gradient):
        # proj's output has its gradient before its input: z is still there.
        _add_gram(self.sums.attn_gram, gradient)
        if self.sums.joint_z is None:
            return
        for f, g in _parts(self.kept["z"], gradient):
            flat = rearrange(f.double(), "b t c -> 1 (b t) c")
            self.sums.joint_z.add(flat, rearrange(g.double().norm(dim=-1), "b t -> 1 (b t)"))

    def _add_z(self, z, gradient):
        for f, g in _parts(z, gradient):
            f, g = self._heads(f), self._heads(g)
            if self.moments:
                self.sums.grad_z.add(f, g.square().sum(-1))
            if self.block.parts[0].whole:
                taylor = (f * g).abs()
                self.sums.taylor_attn[2] += taylor.sum(1)
                self.sums.hessian_attn[2] += taylor.square().sum(1)

    def _add_hidden(self, before, gradient):
        mlp, part = self.block.mlp, self.block.parts[1]
        for *inputs, g in _parts(*before, gradient):
            # Under autocast they are of a narrower type than the weights, which the norm of some kinds refuses. A copy,
            # because an activation may work in place.
            hidden = part.hidden(mlp, *(x.to(self.block.output("mlp").weight, copy=True) for x in inputs))
            a, g = (rearrange(t.float(), "b t m -> (b t) m") for t in (hidden, g))
            taylor = (a * g).abs()
            self.sums.taylor_mlp += taylor.sum(0, dtype=torch.float64)
            self.sums.hessian_mlp += taylor.square().sum(0, dtype=torch.float64)
            if self.hidden:
                self.sums.hidden.add(a.double().unsqueeze(0), g.double().square().sum(-1).unsqueeze(0))


def _parts(*tensors):
    """Tensors [B, T, n] a few images at a time, so that what is computed from them in float64 stays small."""
    images = max(TOKENS_AT_ONCE // tensors[0].shape[1], 1)
    return zip(*(tensor.split(images) for tensor in tensors), strict=True)


def _add_gram(total, gradient):
    """``total`` += g g^T for every token of ``gradient`` [B, T, D]."""
    for (part,) in _parts(gradient):
        total.add(rearrange(part.double(), "b t d -> 1 (b t) d"))


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
    taps = [_BlockTap(block, device, moments, hidden) for block in blocks_of(model)]
    seen = torch.zeros((), device=device)
    try:
        for images, labels, positions in utils.progress(batches, "statistics"):
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
