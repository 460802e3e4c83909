"""Training for one epoch, evaluating, and measuring what the removal of each residual branch costs."""

import json
from contextlib import nullcontext

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import accuracy
from torch import nn
from torch.nn import functional as F

import utils
from checkpoints import trim_log
from datasets import report_bad_images
from models.supernet import Replay, named_blocks, replaced, set_widths
from utils import progress, say


def make_criterion(args):
    """The training loss for mixed labels, smoothed labels or plain ones, as in DeiT."""
    if args.mixup > 0 or args.cutmix > 0:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def fit(run, loader, criterion, output, score, mixup=None, teacher=None, draw_of=None, extra=dict):
    """Train from where ``run`` (Run) stands to its last epoch; log, evaluate and write checkpoints into ``output``.

    Args:
        score: function without arguments: (figures to log, the one number by which the best checkpoint is kept, or
            None where nothing can be compared yet).
        draw_of: function of the epoch that gives ``train_one_epoch`` its ``draw``, for a super-network.
        extra: function without arguments: further members of the checkpoints.
    Raises utils.Interrupted after a signal, with everything saved, and what ``train_one_epoch`` raises.
    """
    args = run.args
    utils.catch_signals()

    trim_log(output / "log.txt", run.epoch)

    def save():
        run.save_mid_epoch(output, **extra())

    try:
        for epoch in range(run.epoch, args.epochs):
            watch = utils.Stopwatch(run.device)
            draw = draw_of(epoch) if draw_of else None
            loader.sampler.set_epoch(epoch, run.updates * args.accum_iter * args.batch_size)
            figures = train_one_epoch(run, loader, criterion, epoch, mixup, draw, teacher, save)
            record, best = {"epoch": epoch} | {f"train_{k}": v for k, v in figures.items()}, False
            if (epoch + 1) % args.eval_period == 0 or epoch + 1 == args.epochs:
                figures, value = score()
                record |= figures
                best = value is not None and value > run.max_accuracy
                run.max_accuracy = value if best else run.max_accuracy
            record["seconds"] = round(watch.seconds(), 1)
            utils.append_json_line(record, output / "log.txt")
            say(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()}))
            run.scheduler.step(epoch + 1)
            run.save_epoch(output, best, **extra())
    except utils.Interrupted:
        # Evaluation and importance change nothing that is saved, so whichever rank gets here can write.
        save()
        raise


def train_one_epoch(run, loader, criterion, epoch, mixup=None, draw=None, teacher=None, save=None):
    """One epoch of ``run`` (Run), or what is left of it.

    All randomness comes from (seed, global step, rank), so that a resumed run repeats an uninterrupted one. An update
    takes ``--accum_iter`` batches, all through the same sub-networks: it equals one of a batch so many times larger.
    ``draw``: function of the global step that names the sub-networks it trains, as a list of Widths. ``teacher``:
    Distillation or None. ``save``: writes a checkpoint, called every ``--save_every_steps``.
    Returns {'loss': mean over ranks, 'lr': last rate}, and 'skipped' updates if there are any. All ranks together raise
    FloatingPointError on a non-finite loss before the optimiser sees it, and utils.Interrupted after a signal.
    """
    args, device = run.args, run.device
    run.parallel.train()
    if run.epoch != epoch:
        run.begin(epoch)
    batches = iter(progress(loader, f"epoch {epoch}", run.updates * args.accum_iter, stoppable=False))
    for index in range(run.updates, run.updates_per_epoch):
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
        flags = [not torch.isfinite(loss), utils.stopping()]
        bad, stop = utils.all_reduce_max(torch.tensor(flags, dtype=torch.int32, device=device)).tolist()
        _finish_update(run, step, loss, bad)
        if stop or (save and args.save_every_steps and run.updates % args.save_every_steps == 0):
            run.mean_loss()
            if stop:
                raise utils.Interrupted
            save()
    report_bad_images(loader, f"epoch {epoch}")
    figures = {"loss": run.mean_loss(), "lr": run.optimizer.param_groups[0]["lr"]}
    return figures | ({"skipped": run.skipped} if run.skipped else {})


def _finish_update(run, step, loss, bad):
    """Let the optimiser have the gradients, or skip them if a rank's loss is ``bad`` and --skip_nonfinite allows."""
    if bad:
        run.skipped += 1
        if run.skipped > run.args.skip_nonfinite:
            epoch, index = divmod(step, run.updates_per_epoch)
            raise FloatingPointError(
                f"the loss is {loss.item()} on this rank at epoch {epoch}, step {index}; the last checkpoint is from "
                "before it. --skip_nonfinite N leaves out up to N such steps"
            )
    else:
        run.update(step)
        run.loss_sum, run.losses = run.loss_sum + loss, run.losses + 1
    run.updates += 1


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
    training, blocks = model.training, named_blocks(model)
    model.eval()
    sums, n = torch.zeros(1 + 2 * len(blocks), dtype=torch.float64, device=device), 0
    try:
        for images, labels, _ in progress(loader, "sensitivity"):
            images, labels = images.to(device), labels.to(device)
            with utils.autocast(device, amp):
                sums += _branch_removal_of_batch(model, blocks, images, labels, MEASURES[measure])
            n += len(labels)
    finally:
        model.train(training)
    report_bad_images(loader, "sensitivity")
    count = utils.all_reduce_sum(torch.tensor(float(n), dtype=torch.float64, device=device))
    value, *without = (utils.all_reduce_sum(sums) / count).tolist()
    return value, without


def _branch_removal_of_batch(model, blocks, images, labels, measure):
    """Summed measures [1 + 2L] of one batch; ``blocks``: [(dotted name, block)] of the model."""
    inputs = []
    handles = [block.register_forward_pre_hook(lambda _m, args: inputs.append(args[0])) for _, block in blocks]
    try:
        values = [measure(model(images), labels)]
    finally:
        for handle in handles:
            handle.remove()
    for index, (path, block) in enumerate(blocks):
        passed = {before: Replay() for before, _ in blocks[:index]} | {path: Replay(inputs[index], block)}
        attn, mlp = block.attn_width, block.mlp_width
        for widths in ((0, mlp), (attn, 0)):
            if widths == (attn, mlp):
                values.append(values[0])
                continue
            block.set_widths(*widths)
            try:
                with replaced(model, passed):
                    values.append(measure(model(images), labels))
            finally:
                block.set_widths(attn, mlp)
    return torch.stack(values)
