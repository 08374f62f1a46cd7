"""Attention ops on the `DotProductAttention` of megatron-core, of its local spec."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.op import Refusal
from ..rewrites.attention import Attention, Wish, allowed, with_causality
from ..rewrites.rewrite import InPlace
from ..rewrites.softcap_output import softcapped


class MegatronAttention(Attention):
    """Scales by another number; caps and masks are its `scale_mask_softmax`'s."""

    @classmethod
    def check(cls, entry: Wish, module: nn.Module) -> None:
        own: Any = module.scale_mask_softmax
        if entry.name in ("size", "causal") and getattr(own, "window_size", None) is not None:
            raise Refusal(
                "it has a window itself (config.window_size), which stands in the place of any mask",
                "build the model without window_size, and let the rule say it",
                code="GP466",
            )
        if entry.name == "causal" and entry.value is False:
            raise Refusal(
                "the mask that it is given is causal, and does not say what lies beyond",
                "build the layers with AttnMaskType.padding",
                code="GP466",
            )

    @classmethod
    def companions(cls, entry: Wish, module: nn.Module) -> Iterable[tuple[nn.Module, type[InPlace], Any]]:
        own: Any = module.scale_mask_softmax
        return [] if entry.name == "by" else [(own, MegatronScores, entry)]

    @property
    def softmax_scale(self) -> float:
        by = self.wishes.by
        if by is None:
            return self.__dict__["softmax_scale"]  # type: ignore[no-any-return]
        # apply_query_key_layer_scaling divides here, and multiplies again behind.
        return by / (getattr(self.scale_mask_softmax, "scale", None) or 1.0)  # type: ignore[no-any-return]

    @softmax_scale.setter
    def softmax_scale(self, value: float) -> None:
        self.__dict__["softmax_scale"] = value


class MegatronScores(Attention):
    """Of `FusedScaleMaskSoftmax`: scores (batch x heads x queries x keys) become weights. Its fused kernels know
    neither cap nor window, so torch's own operations are used, as without them."""

    def forward(self, input: Tensor, mask: Tensor | None, *rest: Any, **options: Any) -> Any:
        wishes, own = self.wishes, self
        if not self._attention_wishes:
            return super().forward(input, mask, *rest, **options)
        if wishes.cap is not None:
            scale: Any = own.scale or 1.0
            input = softcapped(input * scale, wishes.cap) / scale if scale != 1.0 else softcapped(input, wishes.cap)
        if wishes.masks:
            queries, keys = input.shape[-2:]
            if mask is None and own.attn_mask_type.name == "causal":  # type: ignore[union-attr]
                wishes = with_causality(wishes, True)
            places = torch.arange(queries, device=input.device) + (keys - queries)
            hidden = ~allowed(places, keys, wishes)
            mask = hidden[None, None] if mask is None else hidden | mask
        return own.forward_torch_softmax(input, mask, *rest, **options)  # type: ignore[operator]
