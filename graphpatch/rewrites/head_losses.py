"""The losses of heads, as Transformers computes them for models that have such heads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..lang.diagnostics import ApplyError, Diagnostic


def loss_of(logits: Tensor, labels: Tensor, problem: str | None) -> Tensor:
    """Of logits, B x labels, or B x S x labels for `tokens`. Without a problem the labels decide: of one logit it is
    regression, whole numbers are classes, others are of multiple labels."""
    count, labels = logits.shape[-1], labels.to(logits.device)
    if problem == "tokens":
        return F.cross_entropy(logits.float().view(-1, count), _numbers(labels, logits.shape[:-1]).view(-1))
    if problem is None:
        whole = labels.dtype in (torch.long, torch.int)
        problem = (
            "regression" if count == 1 else "single_label_classification" if whole else "multi_label_classification"
        )
    if problem == "single_label_classification":
        return F.cross_entropy(logits.view(-1, count), _numbers(labels, logits.shape[:1]).view(-1))
    if count == 1 and labels.numel() == logits.numel():
        labels = labels.view_as(logits)
    if labels.shape != logits.shape:
        raise _misfit(labels, logits.shape)
    if problem == "regression":
        return F.mse_loss(logits, labels.to(logits.dtype))
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def _numbers(labels: Tensor, shape: torch.Size) -> Tensor:
    if labels.numel() != shape.numel():
        raise _misfit(labels, shape)
    if labels.is_floating_point():
        raise ApplyError(
            Diagnostic("GP574", "the labels are the numbers of classes, and must be whole", fixes=("labels.long()",))
        )
    return labels.long()


def _misfit(labels: Tensor, shape: torch.Size) -> ApplyError:
    return ApplyError(Diagnostic("GP574", f"labels of {tuple(labels.shape)} do not fit logits for {tuple(shape)}"))
