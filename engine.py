"""Training for one epoch, and evaluation."""

from contextlib import nullcontext

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import accuracy
from torch import nn
from torch.nn import functional as F

import utils
from datasets import report_bad_images
from models.vit.supernet import set_widths


def mixup_and_criterion(args, classes):
    """(timm's Mixup or None, the training loss for mixed labels, smoothed labels or plain ones), as in DeiT."""
    if args.mixup > 0 or args.cutmix > 0:
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=classes)
        return mixup, SoftTargetCrossEntropy()
    return None, LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def train_one_epoch(run, loader, criterion, epoch, mixup=None, teacher=None, draw=None):
    """One epoch of ``run`` (TrainingRun), or what is left of it.

    All randomness comes from (seed, global step, rank), so that a resumed run repeats an uninterrupted one. An update
    sums ``--accum-iter`` batches, as if they were one batch if they go through the same sub-networks.

    Args:
        loader: batches of this rank, from where the epoch stands.
        teacher: Distillation or None.
        draw: function of the global step and the number of the batch in its update, which returns the sub-networks
            that the batch trains, a list of Widths.
    Returns {'train_loss': mean over ranks, 'train_lr': last rate, 'images_per_s': of all ranks}, and the updates of the
    run so far that are 'train_skipped', or 'train_overflowed' in fp16, if there are any. All ranks together raise
    FloatingPointError on a non-finite loss before the optimiser sees it, and utils.Interrupted after a signal.
    """
    args, device = run.args, run.device
    run.parallel.train()
    if run.epoch != epoch:
        run.begin_epoch(epoch)
    before, watch, together = run.images_done(), utils.Stopwatch(device), args.batch_size * utils.world_size()
    batches = iter(utils.progress(loader, f"epoch {epoch}", run.updates * args.accum_iter, together))
    for index in range(run.updates, run.updates_per_epoch):
        step, loss = epoch * run.updates_per_epoch + index, 0.0
        run.optimizer.zero_grad()
        for micro in range(args.accum_iter):
            images, labels, _ = next(batches)
            subnets = draw(step, micro) if draw else [None]
            utils.seed_all(args.seed, step * args.accum_iter + micro, utils.rank())
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            if mixup:
                # timm's Mixup pairs images and so needs an even number: an odd batch gives up its last.
                even = len(images) // 2 * 2
                images, labels = mixup(images[:even], labels[:even])
            loss = loss + _backward(run, subnets, images, labels, criterion, teacher, micro + 1 == args.accum_iter)
        flags = [not torch.isfinite(loss), utils.stopping()]
        bad, stop = utils.all_reduce(torch.tensor(flags, dtype=torch.int32, device=device), "MAX").tolist()
        _finish_update(run, step, loss, bad)
        if stop or (args.save_every_steps and run.updates % args.save_every_steps == 0):
            run.mean_loss()
            if stop:
                raise utils.Interrupted
            run.save_mid_epoch()
    report_bad_images(loader, f"epoch {epoch}")
    figures = {"train_loss": run.mean_loss(), "train_lr": run.optimizer.param_groups[0]["lr"]}
    figures["images_per_s"] = round((run.images_done() - before) * utils.world_size() / watch.seconds(), 1)
    counts = {"train_skipped": run.skipped, "train_overflowed": run.overflowed}
    return figures | {name: count for name, count in counts.items() if count}


def _finish_update(run, step, loss, bad):
    """Let the optimiser have the gradients, or skip them if a rank's loss is ``bad`` and --skip-nonfinite allows."""
    if bad:
        run.skipped += 1
        if run.skipped > run.args.skip_nonfinite:
            epoch, index = divmod(step, run.updates_per_epoch)
            raise FloatingPointError(
                f"the loss is {loss.item()} on this rank at epoch {epoch}, step {index}; the last checkpoint is from "
                "before it. --skip-nonfinite N leaves out up to N such steps"
            )
    else:
        run.update(step)
        run.loss_sum, run.losses = run.loss_sum + loss, run.losses + 1
    run.updates += 1


def _backward(run, subnets, images, labels, criterion, teacher, synchronise):
    """Add the gradients of one batch, the mean over ``subnets``; ranks exchange them if ``synchronise``.

    Returns the mean loss over the sub-networks, divided by the number of batches in an update.
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


def evaluate(model, loader, device, amp="none"):
    """Evaluate a network at its present widths, on ``device``. loader: of batches (images, labels, ...).

    Every rank sees its share of the loader once; the sums are added up exactly. Returns {'loss': mean cross-entropy,
    'top1', 'top5': per cent, 'images', 'images_per_s'}.
    """
    return evaluate_all([(model, None)], loader, device, amp)[0]


@torch.compiler.set_stance("force_eager")
@torch.inference_mode()
def evaluate_all(sizes, loader, device, amp="none"):
    """``evaluate`` several networks in one pass, which reads each image once. Returns the list of their figures.

    sizes: pairs (network, its Widths, or None for its present ones); a super-network may be in several of them.
    """
    for network, _ in sizes:
        network.eval()
    sums, seconds = (torch.zeros(len(sizes), n, dtype=torch.float64, device=device) for n in (4, 1))
    for images, labels, *_ in loader:
        images, labels = images.to(device), labels.to(device)
        n = len(labels)
        for (network, widths), own, spent in zip(sizes, sums, seconds, strict=True):
            if widths:
                set_widths(network, widths)
            watch = utils.Stopwatch(device)
            with utils.autocast(device, amp):
                logits = network(images)
            spent += watch.seconds()
            logits = logits.float()
            # timm's accuracy is a share in float32: the number of hits is an integer again.
            top1, top5 = ((share * n / 100).round() * 100 for share in accuracy(logits, labels, topk=(1, 5)))
            loss = F.cross_entropy(logits, labels, reduction="sum")
            own += torch.stack((loss, top1, top5, torch.tensor(float(n), device=device)))
    rates = utils.all_reduce(sums[:, 3:] / seconds.clamp(min=1e-9)).flatten().tolist()
    figures = []
    for (loss, top1, top5, n), rate in zip(utils.all_reduce(sums).tolist(), rates, strict=True):
        figures.append({"loss": loss / n, "top1": top1 / n, "top5": top5 / n, "images": int(n), "images_per_s": rate})
    return figures


@torch.inference_mode()
def features(model, loader, device, amp="none"):
    """(outputs of a network [N, D] float32, labels [N]) over a loader and all ranks, as NumPy arrays."""
    model.eval()
    columns = []
    for images, labels, _ in loader:
        with utils.autocast(device, amp):
            columns.append((model(images.to(device)).float().cpu(), labels))
    own = [torch.cat(column).numpy() for column in zip(*columns, strict=True)]
    return [np.concatenate(parts) for parts in zip(*utils.gather(own), strict=True)]


def probe(model, train, test, device, amp, kind):
    """``evaluate`` a network without a classifier by one that is fitted to its features of the loader ``train``.

    kind: 'knn', the 20 nearest by cosine, weighted by one over their distance, or 'linear', logistic regression on
    standardised features. Returns {'probe': kind, 'top1', 'top5': per cent, 'images'}, and None for 'loss' and
    'images_per_s'.
    """
    # Here, because importing them takes longer than anything else that a stage starts with.
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (known, their_labels), (asked, labels) = (features(model, loader, device, amp) for loader in (train, test))

    def hits():
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        if kind == "knn":
            classifier = KNeighborsClassifier(min(20, len(known)), weights="distance", metric="cosine")
        scores = classifier.fit(known, their_labels).predict_proba(asked)
        found = classifier.classes_[np.argsort(-scores, axis=1, kind="stable")[:, :5]] == labels[:, None]
        return 100 * found[:, 0].mean().item(), 100 * found.any(1).mean().item()

    top1, top5 = utils.from_main(hits)
    return {"probe": kind, "loss": None, "top1": top1, "top5": top5, "images": len(labels), "images_per_s": None}
