"""Another factor on attention scores."""

from __future__ import annotations

from typing import ClassVar

from .attention import AttentionOp
from .registry import register
from .softcap_output import Cap


@register("attention.scale")
class AttentionScale(AttentionOp):
    """softmax(by * q k^T + mask) v, in the place of the factor that is there, 1 / sqrt(head_dim) as a rule (Vaswani et
    al., arXiv:1706.03762, section 3.2.1). Gemma 2 has 1 / sqrt(query_pre_attn_scalar)."""

    word: ClassVar[str] = "rescaled"

    by: Cap
