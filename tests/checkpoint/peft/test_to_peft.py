"""What `to_peft` writes, PEFT itself loads, and computes the same."""

from __future__ import annotations

import pytest
import torch

import graphpatch
from tests.checkpoint.peft.models import (
    Attending,
    ConvNet,
    bert,
    by_peft,
    deepseek,
    gpt2,
    gpt_oss,
    llama,
    llama4,
    logits,
    mixtral,
    qwen3_moe,
    t5,
    trained,
)


def tied():
    return llama(tie_word_embeddings=True)


FREEZE = "\nfreeze ** except @new"
CASES = {
    "llama, two linears": (llama, "patch {q,v}_proj with lora(rank=4, alpha=6)"),
    "llama, all linears": (llama, "patch layers[*].**:Linear with lora(rank=4)"),
    "llama, some layers": (llama, "patch layers[1:].self_attn.q_proj | layers[0].mlp.up_proj with lora(rank=4)"),
    "llama, two ranks": (
        llama,
        "patch layers[0].**.{q,v}_proj with lora(rank=2, alpha=8) patch layers[1:].**.q_proj with lora(rank=4, alpha=3)",
    ),
    "llama, rsLoRA": (llama, "patch q_proj with lora(rank=4, alpha=6, use_rslora=true)"),
    "llama, rsLoRA on some": (
        llama,
        "patch q_proj with lora(rank=4, alpha=6, use_rslora=true) patch v_proj with lora(rank=2, alpha=6)",
    ),
    "llama, embedding": (llama, "patch embed_tokens | q_proj with lora(rank=4, alpha=6)"),
    "llama, head": (llama, "patch lm_head | v_proj with lora(rank=4, alpha=6)"),
    "llama, head trained": (llama, "patch q_proj with lora(rank=4)", "train lm_head"),
    "llama, norms trained": (llama, "patch q_proj with lora(rank=4)", "train :*Norm"),
    "llama, embedding trained": (llama, "patch q_proj with lora(rank=4)", "train embed_tokens"),
    "llama, target trained": (llama, "patch q_proj with lora(rank=4)", "train q_proj | v_proj"),
    "gpt2": (gpt2, "patch h[*].**.c_attn | mlp.c_fc with lora(rank=4, alpha=6)"),
    "gpt2, biases": (gpt2, "patch c_attn with lora(rank=4)", "train c_attn.bias"),
    "gpt2, all biases": (gpt2, "patch c_attn with lora(rank=4)", "train bias"),
    "gpt2, positions": (gpt2, "patch wpe | c_attn with lora(rank=4)"),
    "bert, head trained": (bert, "patch query | value with lora(rank=4)", "train ^classifier"),
    "bert, head's bias trained": (bert, "patch query with lora(rank=4)", "train ^classifier.bias"),
    "t5": (t5, "patch decoder.block[*].**.{q,v} with lora(rank=4, alpha=6)"),
    "convolutions": (ConvNet, "patch first | row | head with lora(rank=4, alpha=6)"),
    "convolution with groups": (ConvNet, "patch grouped with lora(rank=4, alpha=6)"),
    "DoRA": (llama, "patch q_proj | down_proj with lora(rank=4, alpha=6, dora=true)"),
    "DoRA, embedding": (llama, "patch embed_tokens with lora(rank=4, dora=true)"),
    "DoRA, gpt2": (gpt2, "patch c_attn with lora(rank=4, dora=true)"),
    "DoRA, convolutions": (ConvNet, "patch first | row with lora(rank=4, dora=true)"),
    "bias of B": (gpt2, "patch c_attn with lora(rank=4, bias=true)"),
    "bias of B, on some": (gpt2, "patch c_attn with lora(rank=4, bias=true) patch c_fc with lora(rank=2)"),
    "PiSSA": (llama, 'patch q_proj with lora(rank=4, alpha=6, init="pissa")'),
    "PiSSA, rsLoRA, on some": (
        llama,
        'patch q_proj with lora(rank=4, init="pissa", use_rslora=true) patch v_proj with lora(rank=4)',
    ),
    "PiSSA and DoRA": (llama, 'patch q_proj with lora(rank=4, init="pissa", dora=true)'),
    "OLoRA": (llama, 'patch q_proj | v_proj with lora(rank=4, init="olora")'),
    "orthogonal": (llama, 'patch q_proj with lora(rank=4, init="orthogonal")'),
    "mixtral, experts": (mixtral, "patch experts.{gate_up,down}_proj | q_proj with lora(rank=4, alpha=6)"),
    "mixtral, one stack": (mixtral, "patch experts.gate_up_proj with lora(rank=4, alpha=6)"),
    "mixtral, two ranks": (
        mixtral,
        "patch experts.gate_up_proj with lora(rank=4) patch experts.down_proj | q_proj with lora(rank=2, alpha=3)",
    ),
    "mixtral, router trained": (mixtral, "patch experts.down_proj with lora(rank=4)", "train mlp.gate"),
    "mixtral, stack trained": (
        mixtral,
        "patch experts.down_proj with lora(rank=4)",
        "train experts.gate_up_proj | layers[0].**.experts.down_proj",
    ),
    "qwen3 moe, a dense layer": (qwen3_moe, "patch mlp.{gate,up,down}_proj | experts.down_proj with lora(rank=4)"),
    "deepseek, all linears": (deepseek, "patch @layers[*].**:Linear | experts.gate_up_proj with lora(rank=4)"),
    "llama 4, experts": (llama4, "patch experts.{gate_up,down}_proj | q_proj with lora(rank=4, alpha=6)"),
    "gpt-oss, experts": (gpt_oss, "patch experts.{gate_up,down}_proj | q_proj with lora(rank=4, alpha=6)"),
    "parts of a fused linear": (gpt2, 'patch c_attn with lora(rank=4, alpha=6, parts=["q", "v"])'),
    "attention": (Attending, "patch attn with lora(rank=4, alpha=6)"),
    "attention, parts": (Attending, 'patch attn with lora(rank=4, alpha=6, parts=["q", "v", "out"])'),
    "attention, part": (Attending, 'patch attn with lora(rank=4, alpha=6, parts=["k"])'),
    "attention, output": (
        Attending,
        'patch attn with lora(rank=4, alpha=6, parts=["out"])',
        "train attn.out_proj.bias",
    ),
    "tied embedding and head": (tied, "patch embed_tokens | lm_head with lora(rank=4, alpha=6, tied=true)"),
    "convolutions, norm trained": (ConvNet, "patch first with lora(rank=4)", "train norm"),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same(case, tmp_path):
    make, rules, *more = CASES[case]
    model, base = make(), make()
    patch = trained(model, "use roles " + rules + FREEZE + "\n" + "".join(more))
    expected = logits(model).detach()
    assert not torch.allclose(expected, logits(base), atol=1e-3)
    graphpatch.to_peft(patch, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    torch.testing.assert_close(by_peft(base, tmp_path), expected, atol=1e-5, rtol=1e-5)

    ours = make()
    again = graphpatch.load_peft(ours, tmp_path)
    torch.testing.assert_close(logits(ours).detach(), expected, atol=1e-6, rtol=1e-6)
    before = {key: tensor.clone() for key, tensor in make().state_dict().items()}
    graphpatch.save_adapter(again, tmp_path / "ours")
    third = make()
    graphpatch.load_adapter(third, tmp_path / "ours")
    assert torch.equal(logits(third), logits(ours))
    again.revert()
    assert all(torch.equal(tensor, before[key]) for key, tensor in ours.state_dict().items())
