"""Models whose layers are attention or feed-forward alone: HybridModel, which takes GPTModel's place, and before
megatron-core 0.19 MambaModel, which is built alike."""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn

import graphpatch

from .models import VOCABULARY, RMSNorm, config, fill
from .pool import one, ranks
from .training import assert_same, together, trained

try:
    from megatron.core.models.hybrid import hybrid_block as block
    from megatron.core.models.hybrid.hybrid_block import HybridStack as Stack
    from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules as Submodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel as Model

    SPEC, PATTERN = "hybrid_stack_spec", "hybrid_layer_pattern"
except ImportError:
    from megatron.core.models.mamba.mamba_model import MambaModel as Model
    from megatron.core.ssm import mamba_block as block
    from megatron.core.ssm.mamba_block import MambaStack as Stack
    from megatron.core.ssm.mamba_block import MambaStackSubmodules as Submodules

    SPEC, PATTERN = "mamba_stack_spec", "hybrid_override_pattern"

FROZEN = "freeze ** except @new"
EVERY = "use roles\npatch @linears with lora(rank=4, alpha=8)\n" + FROZEN


def hybrid(**changes: Any) -> nn.Module:
    """Attention, feed-forward, and so on: eight layers of one thing each."""
    block.TENorm = RMSNorm  # what the stack ends with, where there is no Transformer Engine
    attention = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(ColumnParallelLinear, DotProductAttention, RowParallelLinear),
            ),
            self_attn_bda=get_bias_dropout_add,
        ),
    )
    feed_forward = ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    stack = ModuleSpec(module=Stack, submodules=Submodules(attention_layer=attention, mlp_layer=feed_forward))
    segment = parallel_state.get_pipeline_model_parallel_world_size() > 1 and PATTERN == "hybrid_layer_pattern"
    model = Model(
        config=config(num_layers=8, **changes),
        vocab_size=VOCABULARY,
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        **{SPEC: stack, PATTERN: "*-*-|*-*-" if segment else "*-*-*-*-"},
    )
    fill(model)
    return model


def case(rules: str, **changes: Any) -> dict[str, Any]:
    model = hybrid(**changes)
    graphpatch.apply([model], graphpatch.parse(rules))  # type: ignore[call-overload]
    fill(model, lambda name: "lora" in name)
    return trained([model], steps=3)


def in_sequence(rules: str) -> dict[str, Any]:
    return case(rules, sequence_parallel=True)


@pytest.mark.parametrize(("layout", "run"), [({"tp": 2}, case), ({"tp": 2}, in_sequence), ({"pp": 2}, case)])
def test_lora_over_ranks_is_lora_on_one(layout, run):
    alone = one(case, EVERY)
    assert len([name for name in alone["parameters"] if name.endswith("lora_A")]) == 16
    assert_same(together(ranks(run, EVERY, **layout)), alone)


ROLES = {"@layers[*]": 8, "@block": 8, "@attn": 4, "@mlp": 4, "@qkv": 4, "@attention_output": 4, "@mlp_input": 4,
         "@mlp_output": 4, "@linears": 16, "@embed": 1, "@head": 1, "@norm": 9}  # fmt: skip


def reached() -> dict[str, int]:
    model = hybrid()
    return {role: len(graphpatch.select(model, role)) for role in ROLES}


def test_roles_mean_what_they_do_elsewhere():
    assert one(reached) == ROLES


def adapted() -> tuple[list[str], list[int]]:
    model = hybrid()
    rules = "use roles\npatch @layers[3:5].**:*ParallelLinear with lora(rank=2) expect 4\n" + FROZEN
    patch = graphpatch.apply(model, graphpatch.parse(rules))
    numbers = {m.layer_number - 1 for m in model.decoder.layers for n, _ in m.named_parameters() if "lora" in n}
    return [change.path for change in patch.changes], sorted(numbers)


def test_a_layer_has_its_number_in_the_whole_model():
    feed_forward = [f"decoder.layers.3.mlp.linear_fc{at}" for at in (1, 2)]
    attention = [f"decoder.layers.4.self_attention.linear_{name}" for name in ("proj", "qkv")]
    alone, (first, second) = one(adapted), ranks(adapted, pp=2)
    assert (sorted(alone[0]), alone[1]) == ([*feed_forward, *attention], [3, 4])
    assert (sorted(first[0]), first[1]) == (feed_forward, [3])
    assert (sorted(second[0]), second[1]) == (attention, [4])
