"""Training for one epoch, evaluating, and measuring what the removal of each residual branch costs."""

import shutil
from contextlib import nullcontext

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, accuracy
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import utils
from datasets import report_bad_images
from models.vit import load_weights, read_checkpoint, set_widths
from utils import InputError

BEST_NAME = "best_checkpoint.pth"


class Run:
    """Everything that training changes, and that a checkpoint therefore holds."""

    def __init__(self, model, args, device, batches_per_epoch):
        self.model, self.args, self.device = model, args, device
        self.updates_per_epoch = batches_per_epoch // args.accum_iter
        if not self.updates_per_epoch:
            raise InputError(f"--accum_iter {args.accum_iter}: an epoch has {batches_per_epoch} batches")
        # DeiT's rule: the rate is given for 512 images a step.
        self.batch = args.batch_size * args.accum_iter * utils.world_size()
        self.lr = args.lr if args.unscale_lr else args.lr * self.batch / 512
        self.optimizer = create_optimizer_v2(model, opt=args.opt, lr=self.lr, weight_decay=args.weight_decay)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched=args.sched, num_epochs=args.epochs, min_lr=args.min_lr, warmup_lr=args.warmup_lr,
            warmup_epochs=args.warmup_epochs, updates_per_epoch=self.updates_per_epoch,
        )  # fmt: skip
        self.ema = ModelEmaV3(model, decay=args.model_ema_decay) if args.model_ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.start_epoch, self.max_accuracy = 0, 0.0
        # A sub-network without a branch leaves that branch's parameters out of the backward pass.
        self.parallel = DistributedDataParallel(model, find_unused_parameters=True) if utils.is_distributed() else model

    def update(self, step):
        """One optimiser step with the gradients that are there; ``step`` is the global one."""
        if self.args.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema:
            self.ema.update(self.model, step=step)

    def checkpoint(self, epoch):
        """The layout of the published super-networks."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "epoch": epoch,
            "model_ema": self.ema.module.state_dict() if self.ema else None,
            "scaler": self.scaler.state_dict(),
            "args": self.args,
            "max_accuracy": self.max_accuracy,
        }

    def restore(self, path):
        """Go on from ``path``. Returns the checkpoint's content. Raises InputError if it is no checkpoint of a run."""
        content = read_checkpoint(path)
        missing = [name for name in ("optimizer", "lr_scheduler", "epoch") if name not in content]
        if missing:
            raise InputError(f"--resume {path}: cannot be resumed from, it has no {', '.join(missing)}")
        load_weights(self.model, content["model"], path)
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["lr_scheduler"])
        if self.ema and content.get("model_ema"):
            self.ema.module.load_state_dict(content["model_ema"])
        self.scaler.load_state_dict(content.get("scaler") or {})
        self.start_epoch, self.max_accuracy = content["epoch"] + 1, content.get("max_accuracy", 0.0)
        return content

    def save(self, epoch, output, best=False, **more):
        """Write checkpoint_<epoch>.pth whole, if ``best`` best_checkpoint.pth too; keep the last ``--keep_last``."""
        path = output / f"checkpoint_{epoch}.pth"
        utils.save_torch(self.checkpoint(epoch) | more, path)
        if utils.is_main():
            if best:
                with utils.whole_file(output / BEST_NAME) as temporary:
                    shutil.copyfile(path, temporary)
            for old in range(epoch - self.args.keep_last, -1, -1):
                path = output / f"checkpoint_{old}.pth"
                if not path.exists():
                    break
                path.unlink()


def make_criterion(args):
    """The training loss for mixed labels, smoothed labels or plain ones, as in DeiT."""
    if args.mixup > 0 or args.cutmix > 0:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def train_one_epoch(run, loader, criterion, epoch, mixup=None, draw=None, teacher=None):
    """One epoch of ``run`` (Run); a super-network trains the sub-networks that ``draw(global step)`` names, as Widths.

    All randomness comes from (seed, global step, rank), so that a resumed run repeats an uninterrupted one. An update
    takes ``--accum_iter`` batches, all through the same sub-networks: it equals one of a batch so many times larger.
    ``teacher``: Distillation or None. Returns {'loss': mean over ranks, 'lr': last rate}.
    Raises FloatingPointError on all ranks together on a non-finite loss, before the optimiser sees it.
    """
    args, device = run.args, run.device
    run.parallel.train()
    batches, total = iter(progress(loader, f"epoch {epoch}")), torch.zeros((), device=device)
    for index in range(run.updates_per_epoch):
        step, loss = epoch * run.updates_per_epoch + index, 0.0
        subnets = draw(step) if draw else [None]
        run.optimizer.zero_grad()
        for micro in range(args.accum_iter):
            images, labels, _ = next(batches)
            utils.seed_all(args.seed, step * args.accum_iter + micro, utils.rank())
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            if mixup:
                # timm's Mixup pairs images and so needs an even number: an odd batch gives up its last.
                even = len(images) // 2 * 2
                images, labels = mixup(images[:even], labels[:even])
            loss = loss + _backward(run, subnets, images, labels, criterion, teacher, micro + 1 == args.accum_iter)
        if utils.all_reduce_max((~torch.isfinite(loss)).float()):
            raise FloatingPointError(f"the loss is {loss.item()} at epoch {epoch}, step {index}")
        run.update(step)
        total += loss
    report_bad_images(loader, f"epoch {epoch}")
    mean = utils.all_reduce_sum(total / run.updates_per_epoch) / utils.world_size()
    return {"loss": mean.item(), "lr": run.optimizer.param_groups[0]["lr"]}


def _backward(run, subnets, images, labels, criterion, teacher, synchronise):
    """Add the gradients of one batch, the mean over ``subnets``; ranks exchange them if ``synchronise``.

    Returns the mean loss over the sub-networks, a share of the whole update's.
    """
    total, parts = 0.0, len(subnets) * run.args.accum_iter
    with utils.autocast(run.device, run.args.amp):
        targets = teacher.targets(images) if teacher else None
    for index, widths in enumerate(subnets):
        if widths:
            set_widths(run.model, widths)
        together = synchronise and index + 1 == len(subnets)
        with nullcontext() if together or run.parallel is run.model else run.parallel.no_sync():
            with utils.autocast(run.device, run.args.amp):
                logits = run.parallel(images).float()
            loss = criterion(logits, labels) if targets is None else teacher.loss(criterion, logits, labels, targets)
            run.scaler.scale(loss / parts).backward()
        if teacher and teacher.kind == "inplace" and index == 0:
            targets = logits.detach()
        total = total + loss.detach() / parts
    return total


@torch.inference_mode()
def evaluate(model, loader, device, amp="none"):
    """Top-1 and top-5 accuracy in per cent, mean cross-entropy and images/s of a network at its present widths.

    Every rank sees its share of the loader once; the sums are added up exactly.
    """
    model.eval()
    sums, seconds = torch.zeros(4, dtype=torch.float64, device=device), 0.0
    for images, labels, _ in progress(loader, "evaluate"):
        images, labels = images.to(device), labels.to(device)
        watch = utils.Stopwatch(device)
        with utils.autocast(device, amp):
            logits = model(images)
        seconds += watch.seconds()
        logits = logits.float()
        top1, top5 = accuracy(logits, labels, topk=(1, 5))
        n = len(labels)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack((loss, top1 * n, top5 * n, torch.tensor(float(n), device=device)))
    report_bad_images(loader, "evaluate")
    rate = utils.all_reduce_sum(torch.tensor(sums[3].item() / max(seconds, 1e-9), dtype=torch.float64, device=device))
    loss, top1, top5, n = utils.all_reduce_sum(sums).tolist()
    return {"loss": loss / n, "top1": top1 / n, "top5": top5 / n, "images": int(n), "images_per_s": rate.item()}


class _Replay(nn.Module):
    """Stands for everything before a block: gives out the stored activation whatever goes in."""

    def __init__(self, activation):
        super().__init__()
        self.activation = activation

    def forward(self, _x):
        return self.activation


# What the sensitivity of a branch is measured in, summed over a batch of logits and labels.
MEASURES = {
    "cost": lambda logits, labels: F.cross_entropy(logits.double(), labels, reduction="sum"),
    "accuracy": lambda logits, labels: (logits.argmax(1) == labels).double().sum(),
}


@torch.inference_mode()
def branch_removal(model, loader, device, measure="cost", amp="none"):
    """Mean cross-entropy (or accuracy) of a super-network at its present widths, and with each branch removed (paper,
    PIAD). ``measure``: a key of MEASURES.

    Removing a branch leaves everything before its block unchanged, so those activations are computed once per batch:
    about L + 1 forward passes in place of 2L + 1.
    Returns (value, [2L values without a branch, order of Widths.flat]); removing what is gone already changes nothing.
    """
    training, blocks = model.training, list(model.blocks)
    model.eval()
    sums, n = torch.zeros(1 + 2 * len(blocks), dtype=torch.float64, device=device), 0
    try:
        for images, labels, _ in progress(loader, "sensitivity"):
            images, labels = images.to(device), labels.to(device)
            with utils.autocast(device, amp):
                sums += _branch_removal_of_batch(model, blocks, images, labels, MEASURES[measure])
            n += len(labels)
    finally:
        model.blocks = nn.Sequential(*blocks)
        model.train(training)
    report_bad_images(loader, "sensitivity")
    count = utils.all_reduce_sum(torch.tensor(float(n), dtype=torch.float64, device=device))
    value, *without = (utils.all_reduce_sum(sums) / count).tolist()
    return value, without


def _branch_removal_of_batch(model, blocks, images, labels, measure):
    """Summed measures [1 + 2L] of one batch; leaves ``model.blocks`` replaced."""

    def measured(sequence):
        model.blocks = nn.Sequential(*sequence)
        return measure(model(images), labels)

    inputs = []
    handles = [block.register_forward_pre_hook(lambda _m, args: inputs.append(args[0])) for block in blocks]
    values = [measured(blocks)]
    for handle in handles:
        handle.remove()
    for index, block in enumerate(blocks):
        attn, mlp = block.attn_width, block.mlp_width
        for widths in ((0, mlp), (attn, 0)):
            if widths == (attn, mlp):
                values.append(values[0])
                continue
            block.set_widths(*widths)
            values.append(measured([_Replay(inputs[index]), *blocks[index:]]))
            block.set_widths(attn, mlp)
    return torch.stack(values)


def progress(loader, title):
    """The loader behind a progress bar, on the main rank."""
    return tqdm(loader, desc=title, disable=None if utils.is_main() else True, leave=False, mininterval=1.0)
