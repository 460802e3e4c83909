"""Teachers: targets beside the labels, from a frozen network or from the full network of the same step."""

from functools import cached_property

import timm
import torch
from torch import nn
from torch.nn import functional as F

from models.vit.pretrained import ALIASES, check_known, default_num_classes, downloading, load_weights, read_checkpoint
from models.vit.weights import digest
from utils import ModelError


class Distillation:
    """Targets from a teacher.

    kind: 'soft' or 'hard' from the frozen ``network``, or 'inplace' from the first sub-network of the same step, which
    is the full one (Universally Slimmable Networks). The loss of a network is (1 - alpha) x the label's + alpha x the
    teacher's, with temperature ``tau`` for soft targets, for which the KL is a sum over classes (DeiT's code takes the
    mean, so that its soft teacher counts less). prepare: turns the student's images into the teacher's (size,
    mean and standard deviation).
    """

    def __init__(self, kind, alpha, tau, network=None, prepare=None):
        self.kind, self.alpha, self.tau, self.prepare = kind, alpha, tau, prepare or nn.Identity()
        self.network = network.eval().requires_grad_(False) if network else None

    @cached_property
    def weights(self):
        """The digest of the frozen network's weights; None without one."""
        return digest(self.network.state_dict()) if self.network else None

    @torch.no_grad()
    def targets(self, images):
        """The frozen teacher's logits [B, classes] for images [B, 3, h, w]; None if the targets are made in place."""
        return self.network(self.prepare(images)).float() if self.network else None

    def loss(self, criterion, logits, labels, targets):
        """The mixed loss of one network's ``logits`` [B, classes] against labels and the teacher's ``targets``."""
        if self.kind == "hard":
            distilled = F.cross_entropy(logits, targets.argmax(1))
        else:
            student, teacher = (F.log_softmax(x / self.tau, dim=1) for x in (logits, targets))
            distilled = F.kl_div(student, teacher, log_target=True, reduction="batchmean") * self.tau**2
        return (1 - self.alpha) * criterion(logits, labels) + self.alpha * distilled


def load_teacher(name, num_classes, path=None):
    """Any timm network (or an alias) of ``num_classes``, with the weights of the file ``path``, or else of timm's hub.

    Raises ModelError if there is no such network or its weights cannot be downloaded, InputError if they do not fit.
    """
    check_known(name)
    timm_name, changes = ALIASES.get(name, (name, {}))
    if path:
        teacher = timm.create_model(timm_name, num_classes=num_classes, **changes)
        load_weights(teacher, read_checkpoint(path)["model"], path)
        return teacher
    if default_num_classes(name) != num_classes or changes:
        raise ModelError(f"{name}: there are no published weights for {num_classes} classes", needs_file=True)
    with downloading(timm_name):
        return timm.create_model(timm_name, pretrained=True)
