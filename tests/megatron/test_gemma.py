"""A stock GPTModel changed by rules, with the weights of a Hugging Face checkpoint, against Gemma and Gemma 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import PreTrainedModel

import graphpatch
from graphpatch.checkpoint import base_files

from ..rules.test_gemma import IDS, RIGHT, family, rules
from .models import gathered, global_name
from .pool import one, ranks
from .training import MICROBATCHES, batch, chunks_of, trained

SIZES = {
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-6,
    "activation_func": F.silu,
    "tied": True,
}


def made(name: str, folder: str | None, **options: Any) -> Any:
    """This rank's part of the model, changed and loaded."""
    (chunk,) = chunks_of(**{**SIZES, **options})
    patch = graphpatch.apply(chunk, rules(name))
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.fill_(7)
    if folder is not None:
        graphpatch.load_weights(patch, folder)
    return chunk, patch


def logits(name: str, folder: str, ids: torch.Tensor, masked: torch.Tensor | None, sequence_parallel: bool) -> Any:
    chunk, _ = made(name, folder, gather=True, sequence_parallel=sequence_parallel)
    with torch.no_grad():
        return chunk.eval()(ids, torch.arange(ids.shape[1]).expand(ids.shape), masked)


def gradients(name: str, folder: str, sequence_parallel: bool) -> Any:
    chunk, _ = made(name, folder, sequence_parallel=sequence_parallel)
    found = trained([chunk], steps=1)
    return found["losses"], found["grads"]


def as_parameters(name: str, folder: str) -> Any:
    """A checkpoint's tensors under the names of the whole model."""
    chunk, _ = made(name, folder)
    return {global_name(chunk, n): gathered(p, p.data) for n, p in chunk.named_parameters()}


def hidden(ids: torch.Tensor) -> torch.Tensor:
    """megatron's mask: true is not to be seen."""
    length = ids.shape[1]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return later | (ids == 0)[:, None, None, :]


@pytest.fixture(scope="module", params=["gemma", "gemma2"])
def reference(request, tmp_path_factory) -> tuple[str, PreTrainedModel, Path]:
    model = family(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder


LAYOUTS: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"tp": 2}, False),
    ({"tp": 2}, True),
    ({"pp": 2}, False),
    ({"tp": 2, "pp": 2}, True),
]


@pytest.mark.parametrize("ids", [IDS, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize(("layout", "sequence_parallel"), [({}, False), ({"tp": 2}, False), ({"tp": 2}, True)], ids=str)
def test_logits_padded_on_either_side(reference, ids, layout, sequence_parallel):
    name, model, folder = reference
    with torch.no_grad():
        want = model(ids, attention_mask=(ids != 0).long()).logits[ids != 0]
    for got in ranks(logits, name, str(folder), ids, hidden(ids), sequence_parallel, **layout):
        torch.testing.assert_close(got[ids != 0], want, rtol=1e-5, atol=1e-5)


def decoded(name: str, folder: str, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of what follows a prompt, a token at a time with megatron's cache of keys and values."""
    from megatron.core.inference.contexts import StaticInferenceContext

    chunk, _ = made(name, folder, gather=True)
    chunk.eval()
    context = StaticInferenceContext(len(ids), ids.shape[1])
    places = torch.arange(ids.shape[1]).expand(ids.shape)
    found = []
    with torch.no_grad():
        for begin, end in [(0, prompt), *((at, at + 1) for at in range(prompt, ids.shape[1]))]:
            mask = hidden(ids[:, :end]) if begin == 0 else None
            options = {"inference_context": context, "runtime_gather_output": True}
            found.append(chunk(ids[:, begin:end], places[:, begin:end], mask, **options)[:, -1])
            context.increment_sequence_len_offset(end - begin)
            context.enable_decode_mode()
    return torch.stack(found, 1)


@pytest.mark.parametrize("layout", [{}, {"tp": 2}], ids=str)
def test_logits_a_token_at_a_time_past_the_window(reference, layout):
    name, model, folder = reference
    ids = torch.randint(1, 90, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want, cache = [], None
        for step in (ids[:, :6], *ids[:, 6:].split(1, 1)):
            output = model(step, past_key_values=cache, use_cache=True)
            want.append(output.logits[:, -1])
            cache = output.past_key_values
    want = torch.stack(want, 1)
    for got in ranks(decoded, name, str(folder), ids, 6, **layout):
        # Of the largest logit, since a processor of another width rounds otherwise.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@pytest.fixture(scope="module")
def expected(reference, tmp_path_factory) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and the gradients under the names that they have in the GPTModel: loaded as if they were weights."""
    name, model, _ = reference
    losses = []
    for at in range(MICROBATCHES):
        ids, labels = batch(0, at)
        losses.append(F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten()) / MICROBATCHES)
    sum(losses).backward()  # type: ignore[union-attr]
    folder = tmp_path_factory.mktemp("gradients")
    save_file({n: p.grad.clone() for n, p in model.named_parameters()}, folder / "model.safetensors")
    model.zero_grad(set_to_none=True)
    return float(sum(losses)), one(as_parameters, name, str(folder))


@pytest.mark.parametrize(("layout", "sequence_parallel"), LAYOUTS, ids=str)
def test_loss_and_every_gradient(reference, expected, layout, sequence_parallel):
    name, _, folder = reference
    loss, grads = expected
    found = ranks(gradients, name, str(folder), sequence_parallel, **layout)
    seen: dict[str, torch.Tensor] = {}
    for losses, own in found:
        if losses:
            torch.testing.assert_close(losses[0], loss, rtol=0, atol=1e-5)
        seen |= own
    seen.pop("output_layer.weight", None)  # the last stage's copy of the embedding
    assert seen.keys() == grads.keys()
    for key, grad in grads.items():
        # Transformers' embedding has no gradient for the padding, which is token 0 here.
        rows = slice(1, None) if key.startswith("embedding") else slice(None)
        torch.testing.assert_close(seen[key][rows], grad[rows], rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def bytes_read(name: str, folder: str, sequence_parallel: bool) -> tuple[int, int]:
    """What a rank reads of a checkpoint, and what it holds."""
    read: list[int] = []
    into = base_files.read_into

    def counted(file: Any, block: memoryview, offset: int) -> None:
        read.append(len(block))
        into(file, block, offset)

    base_files.read_into = counted
    chunk, _ = made(name, folder, sequence_parallel=sequence_parallel)
    return sum(read), sum(p.numel() * p.element_size() for p in set(chunk.parameters()))


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"tp": 2, "pp": 2}], ids=str)
def test_a_rank_reads_its_own_part_alone(reference, layout):
    name, _, folder = reference
    for read, held in ranks(bytes_read, name, str(folder), False, **layout):
        assert read == held
