"""The stand-ins, in a process where they came before anything else looked at torch."""

from __future__ import annotations

import subprocess
import sys

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from .pool import one

CASE = """
import sys, torch
from graphpatch.megatron import cpu
cpu.enable()
with torch.device("meta"):
    assert torch.empty(2).is_meta and torch.nn.Linear(2, 2).weight.is_meta
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
model = LlamaForCausalLM(LlamaConfig(**sizes))
model.save_pretrained(sys.argv[1])
again, ids = LlamaForCausalLM.from_pretrained(sys.argv[1]), torch.arange(5)[None]
assert torch.equal(model(ids).logits, again(ids).logits)
assert torch.zeros(2, device="cuda").device.type == "cpu"
print("as they were")
"""


def test_the_meta_device_and_from_pretrained_are_as_they_were(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CASE, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert ran.stdout.strip().endswith("as they were"), ran.stderr


def drawn() -> tuple[list[torch.Tensor], torch.Tensor, bool]:
    tracker, outside = get_cuda_rng_tracker(), torch.get_rng_state()
    start, found = tracker.get_states()["model-parallel-rng"].clone(), []
    for _ in range(2):
        with tracker.fork():
            found.append(torch.rand(3))
            with tracker.fork():
                found.append(torch.rand(3))
            found.append(torch.rand(3))
    return found, start, torch.equal(outside, torch.get_rng_state())


def test_a_random_stream_within_itself_goes_on():
    found, start, untouched = one(drawn)
    stream = torch.Generator()
    stream.set_state(start)
    assert untouched and all(torch.equal(value, torch.rand(3, generator=stream)) for value in found)
