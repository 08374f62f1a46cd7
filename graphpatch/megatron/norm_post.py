"""`norm.post` on the attention and the feed-forward of megatron-core, whose bias is added by the caller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..rewrites.norm import Norm
from ..rewrites.norm_post import After, NormPosted


class ShardedNorm(Norm):
    """A norm that a distributed checkpoint knows how to save: all ranks have it whole."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        held = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(held, prefix, {}, sharded_offsets)  # type: ignore[no-any-return]


class MegatronNormPosted(NormPosted):
    """Norms output and bias together, and so leaves none to add."""

    @classmethod
    def submodules(cls, entry: After, module: nn.Module) -> Mapping[str, nn.Module]:
        return {"post_norm": ShardedNorm(entry.dim, entry.kind, entry.eps, entry.zero_centered)}

    @classmethod
    def attributes(cls, entry: After, module: nn.Module) -> Mapping[str, Mapping[str, Any]]:
        config: Any = module.config
        # Under sequence parallelism each rank has the gradient of its part of the sequence.
        return {"post_norm.weight": {"sequence_parallel": bool(config.sequence_parallel)}}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._norm_post:
            return super().forward(*args, **kwargs)
        output, bias = super(NormPosted, self).forward(*args, **kwargs)
        summed: Tensor = output if bias is None else output + bias
        return self.post_norm(summed), None
