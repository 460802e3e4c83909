"""One streaming pass over the proxy set: weighted moments and Taylor sums of every branch, summed over ranks.

Each batch is reduced to float64 sums as its gradients arrive, and then forgotten. It is cast to float64 a few images at
a time, so that what is needed beyond the network and the sums does not grow with the batch.
"""

from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch.nn import functional as F

import utils
from models.vit.supernet import branches, frozen, hooks
from models.wpac.moments import Halves, Moments, Sums, SymmetricSum, zeros
from utils import InputError

# The number of tokens that are cast to float64 at a time; one image, if it has more. A GPU would wait for launches.
TOKENS_AT_ONCE = {"cpu": 256, "cuda": 8192}


@dataclass
class BranchStatistics(Sums):
    """What the proxy set says of one branch, all sums over tokens, float64. g is the gradient of the objective at a
    feature f.

    taylor, hessian: sum of |g f| and of (g f)^2, [M] of the hidden vector a after the nonlinearity, or [3, H, d] of q,
    k and v. gram: [D, D] sum of go go^T, go the gradient at the output of the last
    Linear. inputs, for compensation: of the input of the last Linear, one group of H d dimensions (z of all heads,
    tokens weighted by |go|) or M (the hidden vector a, tokens weighted by |dC/da|^2). output_sum: [D + 1] sum of what
    the branch adds to the residual stream, and the number of tokens; only where a norm ends the branch.
    """

    taylor: torch.Tensor
    hessian: torch.Tensor
    gram: SymmetricSum | None = None
    inputs: Halves | None = None
    output_sum: torch.Tensor | None = None
    images: torch.Tensor | None = None

    @property
    def taylor_by_width(self):
        """[M], or [d] of q, k and v and of all heads together."""
        return self.taylor.sum_to_size(self.taylor.shape[-1])

    @property
    def mean_gram(self):
        """G = E[sum over the tokens of an image of go go^T], [D, D]. Stages of Swin have their own numbers of tokens:
        only the sum says what the objective loses."""
        return self.gram.dense()[0] / self.images


@dataclass
class AttentionStatistics(BranchStatistics):
    """z is the output of a head, before proj.

    ``theta_*`` weight a token by theta, the paper's token importance, ``grad_*`` by |g|^2. The keys of ``grad_k`` are
    centred in every image (or window) by the mean of its own keys. ``gram_q`` is the sum of g g^T by head.
    Where q and k are not cut z alone is measured: taylor, hessian and theta_v then have z in the place of v, and q and
    k count as zeros.
    """

    theta_q: Moments | None = None
    theta_k: Moments | None = None
    theta_v: Moments | None = None
    grad_q: Moments | None = None
    grad_k: Moments | None = None
    grad_z: Moments | None = None
    gram_q: SymmetricSum | None = None


class _Tap:
    """Hooks on the layers of one branch that add each batch to its statistics during the backward pass.

    ``kept`` holds activations from the forward pass until their gradients arrive. Autograd holds them too.
    ``positions`` are those of the batch's images in the proxy set.
    """

    def __init__(self, branch, sums, moments):
        self.branch, self.sums, self.kept, self.handles, self.positions = branch, sums, {}, [], None
        if branch.family.post_norm and moments:
            sums.output_sum = zeros(branch.output.out_features + 1, device=sums.taylor.device)
            self._on(branch.norm, self._on_end)

    def _on(self, module, hook):
        self.handles.append(module.register_forward_hook(lambda _module, given, output: hook(given[0], output)))

    def _on_end(self, _given, output):
        flat = output.detach().flatten(0, -2)
        self.sums.output_sum[:-1] += flat.sum(0, dtype=torch.float64)
        self.sums.output_sum[-1] += len(flat)

    def _halves(self, *tensors):
        """The images at even positions, a few at a time, then the others: (their Moments, *tensors)."""
        items = len(tensors[0]) // len(self.positions)  # an image may come as several windows
        odd = (self.positions % 2).repeat_interleave(items)
        for half, moments in enumerate(self.sums.inputs.apart if self.sums.inputs else (None, None)):
            for chosen in (odd == half).nonzero().flatten().split(_images_at_once(tensors[0])):
                yield moments, *(tensor[chosen] for tensor in tensors)

    def _add_gram(self, gradient):
        """gradient: [B, T, D], at the output of the last Linear."""
        for (part,) in _few_images(gradient):
            self.sums.gram.add(rearrange(part.double(), "b t d -> 1 (b t) d"))


class _AttentionTap(_Tap):
    def __init__(self, branch, device, moments, hidden):
        heads, width, keys = branch.part.heads, branch.width, branch.part.keys
        sums = AttentionStatistics(*(zeros(3, heads, width, device=device) for _ in range(2)))
        super().__init__(branch, sums, moments)
        if moments:
            of_keys = ("theta_q", "theta_k", "grad_q", "grad_k") if keys else ()
            for name in (*of_keys, "theta_v", "grad_z"):
                setattr(sums, name, Moments(heads, width, device))
            sums.gram_q = SymmetricSum(heads, width, device) if keys else None
            sums.inputs = Halves(1, heads * width, device) if hidden else None
            sums.gram = SymmetricSum(1, branch.output.out_features, device)
        if width and keys:
            self._on(branch.module.qkv, self._on_qkv)
        if width and (moments or not keys):
            self._on(branch.output, self._on_output)

    def _on_qkv(self, _given, output):
        self.kept["qkv"] = output.detach()
        output.register_hook(lambda gradient: self._add_qkv(self.kept.pop("qkv"), gradient))

    def _on_output(self, z, output):
        self.kept["z"] = z.detach()
        z.register_hook(lambda gradient: self._add_z(self.kept.pop("z"), gradient))
        if self.sums.gram:
            output.register_hook(self._add_output)

    def _heads(self, tensor):
        # Heads may come filled up with zeros (families.PaddedLinear).
        return rearrange(tensor.double(), "b t (h d) -> h (b t) d", h=self.branch.part.heads)[..., : self.branch.width]

    def _add_qkv(self, qkv, gradient):
        for features, gradients in _few_images(qkv, gradient):
            for name, f, g in zip("qkv", features.chunk(3, dim=-1), gradients.chunk(3, dim=-1), strict=True):
                self._add_feature(name, self._heads(f), self._heads(g), len(features))

    def _add_feature(self, name, f, g, images):
        """Add q, k or v of a few images and its gradient, both [H, n, d], n the tokens of all images."""
        product, index = (f * g).abs(), "qkv".index(name)
        self.sums.taylor[index] += product.sum(1)
        self.sums.hessian[index] += product.square().sum(1)
        if not self.sums.theta_v:
            return
        theta = product.mean(-1)  # the paper's token importance: mean over the d dimensions of |g f|, [H, n]
        getattr(self.sums, f"theta_{name}").add(f, theta)
        if name == "q":
            self.sums.grad_q.add(f, g.square().sum(-1))
            self.sums.gram_q.add(g)
        if name == "k":
            # The softmax ignores what is common to all keys of an image: only what differs counts.
            tokens = f.unflatten(1, (images, -1))
            self.sums.grad_k.add((tokens - tokens.mean(2, keepdim=True)).flatten(1, 2), g.square().sum(-1))

    def _add_output(self, gradient):
        self._add_gram(gradient)
        if self.sums.inputs:
            # The gradient at proj's output arrives before the one at its input: z is still kept.
            for moments, f, g in self._halves(self.kept["z"], gradient):
                flat = rearrange(f.double(), "b t c -> 1 (b t) c")
                moments.add(flat, rearrange(g.double().norm(dim=-1), "b t -> 1 (b t)"))

    def _add_z(self, z, gradient):
        for f, g in _few_images(z, gradient):
            images, f, g = len(f), self._heads(f), self._heads(g)
            if self.sums.grad_z:
                self.sums.grad_z.add(f, g.square().sum(-1))
            if not self.branch.part.keys:
                self._add_feature("v", f, g, images)


class _MlpTap(_Tap):
    def __init__(self, branch, device, moments, hidden):
        sums = BranchStatistics(*(zeros(branch.width, device=device) for _ in range(2)))
        super().__init__(branch, sums, moments)
        if hidden:
            sums.inputs = Halves(1, branch.width, device)
            sums.gram = SymmetricSum(1, branch.output.out_features, device)
        if branch.width:
            for name in branch.part.inputs:
                self._on(getattr(branch.module, name), partial(self._on_input, name))
            self._on(branch.output, self._on_output)

    def _on_input(self, name, _given, output):
        # What goes into the activation function: the hidden vector is computed again from it.
        self.kept[name] = output.detach()

    def _on_output(self, hidden, output):
        names = self.branch.part.inputs
        hidden.register_hook(lambda gradient: self._add_hidden([self.kept.pop(name) for name in names], gradient))
        if self.sums.gram:
            output.register_hook(self._add_gram)

    def _add_hidden(self, before, gradient):
        module, part = self.branch.module, self.branch.part
        for moments, *inputs, g in self._halves(*before, gradient):
            # Under autocast the inputs are of a narrower type than the weights, which the norm of some kinds refuses.
            # A copy, because an activation may work in place.
            hidden = part.hidden(module, *(x.to(self.branch.output.weight, copy=True) for x in inputs))
            a, g = (rearrange(t.float(), "b t m -> (b t) m") for t in (hidden, g))
            product = (a * g).abs()
            self.sums.taylor += product.sum(0, dtype=torch.float64)
            self.sums.hessian += product.square().sum(0, dtype=torch.float64)
            if moments:
                moments.add(a.double().unsqueeze(0), g.double().square().sum(-1).unsqueeze(0))


def _few_images(*tensors):
    """Tensors [B, T, n], a few images at a time, so that what is computed from them in float64 stays small."""
    return zip(*(tensor.split(_images_at_once(tensor)) for tensor in tensors), strict=True)


def _images_at_once(tensor):
    return max(TOKENS_AT_ONCE[tensor.device.type] // tensor.shape[1], 1)


def collect_statistics(supernet, batches, objective, moments=True, hidden=False, amp="none"):
    """Measure every branch of a super-network at its present widths on the proxy set (docs/method.md).

    Args:
        batches: iterable of (images [B, C, H, W], labels [B], positions [B] in the proxy set), this rank's share.
        objective: function (model, images, labels, positions) -> scalar, a sum over images.
        moments: also collect what the bases need.
        hidden: also collect what compensation needs, M x M and H d x H d float64 numbers per block.
    Returns 2L BranchStatistics, those of attention AttentionStatistics, in the order of Widths.flat, summed over ranks.
    Parameters get no gradient, and the training mode is put back. Raises InputError if an activation or gradient is not
    finite, if no image was seen, and for fp16, which cannot hold the gradients of single activations.
    """
    if amp == "fp16":
        raise InputError("--amp fp16: gradients of single activations are below its range; give none or bf16")
    device = next(supernet.parameters()).device
    kinds = {"attn": _AttentionTap, "mlp": _MlpTap}
    taps = [kinds[branch.name](branch, device, moments, hidden) for branch in branches(supernet)]
    seen = zeros(device=device)
    with frozen(supernet), hooks([handle for tap in taps for handle in tap.handles]):
        for images, labels, positions in batches:
            images = images.to(device).requires_grad_()
            for tap in taps:
                tap.positions = positions
            with utils.autocast(device, amp):
                value = objective(supernet, images, labels.to(device), positions)
            value.backward()
            seen += len(images)
    seen = utils.all_reduce(seen)
    if seen == 0:
        raise InputError("there is no proxy image that can be read")
    for index, tap in enumerate(taps):
        tap.sums.all_reduce()
        tap.sums.images = seen
        if not torch.isfinite(tap.sums.taylor).all():
            raise InputError(
                f"block {index // 2}: activations or gradients on the proxy set are NaN or infinite: check the weights"
            )
    return [tap.sums for tap in taps]


def label_objective(model, images, labels, positions):
    """The paper's: the sum over images of the logit of the true class."""
    return model(images).gather(1, labels[:, None]).sum()


def feature_objective(model, images, labels, positions):
    """For networks without labels or classifier: the pooled feature times a random unit vector, one for each image.

    The squared gradient then estimates how far a feature moves the network's output, |d output|^2 / D.
    """
    feature = model.forward_head(model.forward_features(images), pre_logits=True)
    vectors = [torch.randn(feature.shape[1], generator=utils.keyed_generator(17, int(p))) for p in positions]
    return (feature * F.normalize(torch.stack(vectors)).to(feature)).sum()


OBJECTIVES = {"label": label_objective, "feature": feature_objective}
