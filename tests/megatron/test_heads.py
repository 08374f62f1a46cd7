"""Heads on the last stage of a GPTModel: values by hand from its hidden states, and training over ranks that is training
on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphpatch

from .models import BATCH, LENGTH, fill
from .pool import one, ranks
from .training import assert_same, chunks_of, together, trained

HEADS = {
    "classify": "patch ^ with head.classify(labels=3, bias=true)",
    "mean": 'patch ^output_layer with head.classify(labels=3, pool="mean")',
    "tokens": "patch ^ with head.token_classify(labels=3)",
    "value": "patch ^ with head.value(dropout=0.0)",
    "embed": 'patch ^ with head.embed(dim=8, pool="mean")',
}
REST = "\npatch linear_qkv with lora(rank=4)\nfreeze ** except @new | ^decoder.layers[3].mlp"
IDS = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 90 + 1
POSITIONS = torch.arange(LENGTH).expand(BATCH, LENGTH)


def headed(kind: str, **options: Any) -> nn.Module:
    (chunk,) = chunks_of(**options)
    graphpatch.apply([chunk], graphpatch.parse(HEADS[kind] + REST))  # type: ignore[call-overload]
    fill(chunk, lambda name: ("decoder" not in name.split(".")[0] and "embedding" not in name) or "lora" in name)
    return chunk


def call(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> Any:
    """The loss on the last stage, of whatever head it is."""
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    scores = hasattr(inner, "score") or not inner.post_process
    wanted = labels % 3 if getattr(inner, "_head", None) and inner._head[0].score.pool == "none" else labels[:, 0] % 3
    output = model(ids, POSITIONS, None, labels=wanted if scores else labels)
    if isinstance(output, tuple):
        return output[0].float().mean() + output[1].float().square()[:, 0].mean()
    return output


def case(kind: str, **options: Any) -> dict[str, Any]:
    return trained([headed(kind, **options)], steps=3, call=call)


def in_sequence(kind: str) -> dict[str, Any]:
    return case(kind, sequence_parallel=True)


LAYOUTS = [({"tp": 2}, case), ({"tp": 2}, in_sequence), ({"pp": 2}, case), ({"tp": 2, "pp": 2}, in_sequence)]


@pytest.mark.parametrize(("layout", "run"), LAYOUTS, ids=["tp", "sp", "pp", "tp-pp"])
@pytest.mark.parametrize("kind", HEADS)
def test_over_ranks_a_head_trains_as_on_one(kind, layout, run):
    alone = one(case, kind)
    assert any(
        ("score" in n or "v_head" in n or "projection" in n) and v.abs().max() > 0 for n, v in alone["grads"].items()
    )
    assert_same(together(ranks(run, kind, **layout)), alone)


def values(kind: str, padded: str, **options: Any) -> dict[str, Any]:
    """What the model puts out, and what its decoder does, S x B x H."""
    model: Any = headed(kind, **options).eval()
    seen: list[torch.Tensor] = []
    model.decoder.register_forward_hook(lambda module, given, output: seen.append(output))
    ids, hidden = IDS.clone(), None
    if padded:
        ids[1, : 4 if padded == "left" else LENGTH][-4:] = 0
        hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) | (ids == 0)[:, None, None, :]
    with torch.no_grad():
        output = model(ids, POSITIONS, hidden)
    own = {n: p.data for n, p in model.named_parameters() if n.split(".")[0] in ("score", "v_head", "projection")}
    return {"output": output, "states": seen[0].transpose(0, 1), "real": ids != 0, **own}


@pytest.mark.parametrize("padded", ["", "left", "right"])
@pytest.mark.parametrize("kind", HEADS)
def test_what_it_puts_out_is_made_of_the_last_hidden_states(kind, padded):
    found = one(values, kind, padded)
    states, real, output = found["states"], found["real"], found["output"]
    mean = (states * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    if kind == "classify":
        at = [int(row.nonzero().max()) for row in real]
        wanted = F.linear(states[range(BATCH), at], found["score.weight"], found["score.bias"])
    elif kind == "mean":
        wanted = F.linear(mean, found["score.weight"])
    elif kind == "tokens":
        wanted = F.linear(states, found["score.weight"], found["score.bias"])
    elif kind == "value":
        output, wanted = (
            output[1],
            F.linear(states, found["v_head.summary.weight"], found["v_head.summary.bias"])[..., 0],
        )
    else:
        output, wanted = output[1], F.normalize(F.linear(mean, found["projection.weight"]), dim=-1)
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
    for other in ranks(values, kind, padded, tp=2):
        ours = other["output"][1] if isinstance(other["output"], tuple) else other["output"]
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def kept(kind: str) -> tuple[list[str], bool, dict[str, tuple[int, ...]]]:
    model: Any = chunks_of()[0]
    before, keys = None, list(model.state_dict())
    if model.post_process and model.pre_process:
        before = model(IDS, POSITIONS, None).detach()
    patch = graphpatch.apply(model, graphpatch.parse(HEADS[kind]))
    gained = [key for key in model.state_dict() if key not in keys]
    entries = {
        e.key: e.global_shape for e in model.sharded_state_dict(metadata={}).values() if hasattr(e, "global_shape")
    }
    entries = {key: shape for key, shape in entries.items() if key.split(".")[0] in ("score", "v_head", "projection")}
    patch.revert()
    same = list(model.state_dict()) == keys and (before is None or torch.equal(model(IDS, POSITIONS, None), before))
    return gained, same, entries


@pytest.mark.parametrize("kind", HEADS)
def test_only_the_last_stage_carries_it_and_a_checkpoint_has_it(kind):
    ((gained, same, entries),) = ranks(kept, kind)
    assert gained and same and set(entries) == set(gained)
    first, last = ranks(kept, kind, pp=2)
    assert first == ([], True, {}) and last == (gained, True, entries)


def refused() -> list[str]:
    codes = []
    for rules in (
        HEADS["classify"] + "\npatch ^output_layer with softcap.output(3.0)",
        "patch ^ with head.medusa(2)",
        'patch ^ with head.classify(labels=3, pool="pooler")',
    ):
        model = chunks_of()[0]
        keys = list(model.state_dict())
        try:
            graphpatch.apply(model, graphpatch.parse(rules))
            codes.append("")
        except graphpatch.Error as error:
            codes.append(error.code)
        assert list(model.state_dict()) == keys
    return codes


def test_what_makes_no_sense_is_refused():
    assert one(refused) == ["GP522", "GP448", "GP450"]
