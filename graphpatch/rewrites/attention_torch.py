"""`nn.MultiheadAttention`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attention, Wishes, allowed, as_bias, narrowed, scored, with_causality


class TorchAttention(Attention):
    """Computes what `F.multi_head_attention_forward` computes, with what is asked for. The fused path of the encoder
    layers is kept from passing it by (`patch/fast_path.py`)."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        wishes = self.wishes
        if not self._attention_wishes or wishes == Wishes():
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        module = cast(nn.MultiheadAttention, self)
        if query.is_nested:
            return _nested(module, query, wishes), None
        alone = query.dim() == 2
        if alone:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not module.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        output, weights = _attend(module, query, key, value, key_padding_mask, attn_mask, is_causal, wishes)
        weights = weights.mean(1) if average_attn_weights else weights
        if alone:
            output, weights = output.squeeze(0), weights.squeeze(0)
        elif not module.batch_first:
            output = output.transpose(0, 1)
        return output, weights if need_weights else None


def _nested(module: nn.MultiheadAttention, ragged: Tensor, wishes: Wishes) -> Tensor:
    """Sequences without their padding, as nn.TransformerEncoder makes them where nothing needs a gradient."""
    lengths = [len(one) for one in ragged.unbind()]
    x = torch.nested.to_padded_tensor(ragged, 0.0)
    padding = torch.arange(x.shape[1], device=x.device) >= torch.tensor(lengths, device=x.device)[:, None]
    output, _ = _attend(module, x, x, x, padding, None, False, wishes)
    return torch.nested.as_nested_tensor([one[:length] for one, length in zip(output, lengths)])


def _attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    wishes: Wishes,
) -> tuple[Tensor, Tensor]:
    """query, key, value (batch x length x features) -> output of the same, weights (batch x heads x queries x keys)."""
    heads, width = module.num_heads, module.head_dim
    q, k, v = _projected(module, query, key, value)
    batch, queries, given = q.shape[0], q.shape[1], k.shape[1]
    if module.bias_k is not None and module.bias_v is not None:
        k = torch.cat([k, module.bias_k.expand(batch, -1, -1)], 1)
        v = torch.cat([v, module.bias_v.expand(batch, -1, -1)], 1)
    q, k, v = (x.reshape(batch, -1, heads, width).transpose(1, 2) for x in (q, k, v))
    if module.add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(batch, heads, 1, width)], 2) for x in (k, v))
    bias = _bias(q, padding, mask, is_causal, given, wishes)
    # The keys that the module adds itself are seen by all.
    bias = None if bias is None else F.pad(bias, (0, k.shape[2] - given))
    scores = scored(q @ k.transpose(-2, -1), width**-0.5 if wishes.by is None else wishes.by, wishes.cap, bias)
    weights = F.dropout(scores.softmax(-1), module.dropout, module.training)
    output = (weights @ v).transpose(1, 2).reshape(batch, queries, heads * width)
    return F.linear(output, module.out_proj.weight, module.out_proj.bias), weights


def _projected(module: nn.MultiheadAttention, *inputs: Tensor) -> tuple[Tensor, ...]:
    if module._qkv_same_embed_dim:
        weights: Any = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return tuple(F.linear(x, weight, bias) for x, weight, bias in zip(inputs, weights, biases))


def _bias(
    query: Tensor, padding: Tensor | None, mask: Tensor | None, is_causal: bool, keys: int, wishes: Wishes
) -> Tensor | None:
    """All that is masked, as one bias over the keys that were given; here `true` in a mask means not to be seen."""
    batch, heads, queries, _ = query.shape
    bias: Tensor | None = None
    if mask is not None and not (wishes.causal is False and is_causal):
        # Three dimensions are batch times heads.
        shaped = mask.view(batch, heads, queries, keys) if mask.dim() == 3 else mask
        bias = as_bias(~shaped if shaped.dtype == torch.bool else shaped, query.dtype)
    if padding is not None:
        hidden = as_bias(~padding if padding.dtype == torch.bool else padding, query.dtype)[:, None, None]
        bias = hidden if bias is None else (bias + hidden).clamp(min=torch.finfo(query.dtype).min)
    if wishes.masks or (is_causal and mask is None):
        wanted = with_causality(wishes, is_causal and mask is None) if wishes.causal is None else wishes
        seen = allowed(torch.arange(queries, device=query.device) + (keys - queries), keys, wanted)
        bias = as_bias(seen, query.dtype) if bias is None else narrowed(bias, seen)
    return bias
