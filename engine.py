"""Training for one epoch, evaluating, and measuring what the removal of each residual branch costs."""

import math

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
from models.piad import draw_step
from models.vit import load_weights, read_checkpoint, set_widths
from utils import InputError


class Run:
    """Everything that training changes, and that a checkpoint therefore holds."""

    def __init__(self, model, args, device, updates_per_epoch):
        self.model, self.args = model, args
        # DeiT's rule: the rate is given for 512 images a step.
        self.lr = args.lr if args.unscale_lr else args.lr * args.batch_size * utils.world_size() / 512
        self.optimizer = create_optimizer_v2(model, opt=args.opt, lr=self.lr, weight_decay=args.weight_decay)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched=args.sched, num_epochs=args.epochs, min_lr=args.min_lr,
            warmup_lr=args.warmup_lr, warmup_epochs=args.warmup_epochs, updates_per_epoch=updates_per_epoch,
        )  # fmt: skip
        self.ema = ModelEmaV3(model, decay=args.model_ema_decay) if args.model_ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.start_epoch, self.max_accuracy = 0, 0.0
        # A sub-network without a branch leaves that branch's parameters out of the backward pass.
        self.parallel = DistributedDataParallel(model, find_unused_parameters=True) if utils.is_distributed() else model

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

    def save(self, epoch, output, **more):
        """Write checkpoint_<epoch>.pth whole, then remove all but the last ``--keep_last``."""
        utils.save_torch(self.checkpoint(epoch) | more, output / f"checkpoint_{epoch}.pth")
        if utils.is_main():
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


def train_one_epoch(model, loader, criterion, optimizer, scaler, epoch, device, args, table=None, mixup=None, ema=None):
    """One epoch; with a WidthTable every step trains one uniformly drawn entry of it (paper, PIAD).

    All randomness of a step comes from (seed, global step, rank), so that a resumed run repeats an uninterrupted one.
    ``model`` may be wrapped in DistributedDataParallel. Returns {'loss': mean over ranks, 'lr': last rate}.
    Raises FloatingPointError on a non-finite loss, before the optimiser sees it.
    """
    model.train()
    core = unwrap(model)
    total, count = torch.zeros((), device=device), 0
    for step, (images, labels, _) in enumerate(progress(loader, f"epoch {epoch}")):
        global_step = epoch * len(loader) + step
        utils.seed_all(args.seed, global_step, utils.rank())
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if mixup:
            # timm's Mixup pairs images and so needs an even number: an odd batch gives up its last.
            even = len(images) // 2 * 2
            images, labels = mixup(images[:even], labels[:even])
        if table:
            set_widths(core, table.steps[draw_step(args.seed, global_step, table.last)])
        with utils.autocast(device, args.amp):
            loss = criterion(model(images).float(), labels)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} at epoch {epoch}, step {step}")
        update(model, loss, optimizer, scaler, args.clip_grad)
        if ema:
            ema.update(core, step=global_step)
        total, count = total + loss.detach(), count + 1
    mean = utils.all_reduce_sum(total / count) / utils.world_size()
    return {"loss": mean.item(), "lr": optimizer.param_groups[0]["lr"]}


def update(model, loss, optimizer, scaler, clip_grad):
    """One backward pass and optimiser step; ``scaler`` is a GradScaler, disabled unless the autocast is fp16."""
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    if clip_grad:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    scaler.step(optimizer)
    scaler.update()


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


@torch.inference_mode()
def branch_costs(model, loader, device, amp="none"):
    """Mean cross-entropy of a super-network at its present widths, and with each branch removed (paper, PIAD).

    Removing a branch leaves everything before its block unchanged, so those activations are computed once per batch.
    Returns (cost, [2L costs without a branch, order of Widths.flat]); a branch that is gone already costs nothing more.
    """
    training, blocks = model.training, list(model.blocks)
    model.eval()
    sums, n = torch.zeros(1 + 2 * len(blocks), dtype=torch.float64, device=device), 0
    try:
        for images, labels, _ in progress(loader, "sensitivity"):
            images, labels = images.to(device), labels.to(device)
            with utils.autocast(device, amp):
                sums += _branch_costs_of_batch(model, blocks, images, labels)
            n += len(labels)
    finally:
        model.blocks = nn.Sequential(*blocks)
        model.train(training)
    count = utils.all_reduce_sum(torch.tensor(float(n), dtype=torch.float64, device=device))
    cost, *without = (utils.all_reduce_sum(sums) / count).tolist()
    return cost, without


def _branch_costs_of_batch(model, blocks, images, labels):
    """Summed cross-entropies [1 + 2L] of one batch; leaves ``model.blocks`` replaced."""

    def cost(sequence):
        model.blocks = nn.Sequential(*sequence)
        return F.cross_entropy(model(images).double(), labels, reduction="sum")

    inputs = []
    handles = [block.register_forward_pre_hook(lambda _m, args: inputs.append(args[0])) for block in blocks]
    costs = [cost(blocks)]
    for handle in handles:
        handle.remove()
    for index, block in enumerate(blocks):
        attn, mlp = block.attn_width, block.mlp_width
        for widths in ((0, mlp), (attn, 0)):
            if widths == (attn, mlp):
                costs.append(costs[0])
                continue
            block.set_widths(*widths)
            costs.append(cost([_Replay(inputs[index]), *blocks[index:]]))
            block.set_widths(attn, mlp)
    return torch.stack(costs)


def progress(loader, title):
    """The loader behind a progress bar, on the main rank."""
    return tqdm(loader, desc=title, disable=None if utils.is_main() else True, leave=False, mininterval=1.0)


def unwrap(model):
    """The network inside a DistributedDataParallel wrapper, or the network itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model
