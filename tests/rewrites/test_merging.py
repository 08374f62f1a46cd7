"""What a weight becomes: the kinds, against the forward of the patched module; blocks, against the whole matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import graphpatch
from graphpatch.rewrites.merging import BLOCK_ROWS, LowRank, blocks, merge_blocks, working_dtype
from tests.patch.common import randomise

KINDS = {
    "linear": (nn.Linear(6, 10), torch.randn(3, 6)),
    "linear, rsLoRA": (nn.Linear(6, 10), torch.randn(3, 6), "use_rslora=true, alpha=3"),
    "Conv1D": (Conv1D(10, 6), torch.randn(3, 6)),
    "embedding": (nn.Embedding(10, 6, padding_idx=3), torch.arange(10)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), torch.randn(2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=2), torch.randn(2, 4, 9, 9)),
    "conv2d, groups": (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 9, 9)),
    "conv2d, depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding_mode="reflect", padding=1), torch.randn(2, 4, 9, 9)),
    "transposed conv1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), torch.randn(2, 4, 9)),
    "transposed conv2d, groups": (nn.ConvTranspose2d(4, 6, (3, 2), groups=2), torch.randn(2, 4, 5, 5)),
    "conv3d": (nn.Conv3d(2, 4, 2, dilation=2), torch.randn(1, 2, 5, 5, 5)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_weight_computes_what_base_and_adapter_do(kind):
    module, batch, *options = KINDS[kind]
    model = nn.Sequential(module).double()
    batch = batch if kind == "embedding" else batch.double()
    patch = graphpatch.apply(model, graphpatch.parse(f"patch ^0 with lora(rank=4, {', '.join(options)})\nfreeze **"))
    randomise(patch)
    if kind == "embedding":  # where training would leave it
        module.lora_A.data[:, 3] = 0
    patched = model(batch)
    change = patch._journal.changes[0]
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    tensors = {name: getattr(module, name).detach() for name in change.added}
    (name, merging), *others = change.mixin.merging(change.entry, tensors, shapes).items()
    assert name == "weight" and not others
    weight = module.weight.detach().clone()
    patch.revert()
    assert (model(batch) - patched).abs().max() > 1e-3
    matrix = weight.view(-1, merging.columns)
    for start, stop in ((0, 1), (1, 3), (3, len(matrix))):
        matrix[start:stop] = merging.rows(matrix[start:stop].clone(), start)
    module.weight.data.copy_(weight)
    torch.testing.assert_close(model(batch), patched)


@pytest.mark.parametrize("rows", [0, 1, 7, 511, 512, 513, 1000, 1537])
@pytest.mark.parametrize("columns", [1, 300, 20_000])
def test_blocks_cover_all_rows_once_and_none_is_a_rest(rows, columns):
    found = list(blocks(rows, columns))
    assert [row for start, stop in found for row in range(start, stop)] == list(range(rows))
    sizes = {stop - start for start, stop in found}
    assert not sizes or (max(sizes) <= BLOCK_ROWS and max(sizes) - min(sizes) <= 1)
    assert len(found) < 2 or min(sizes) >= 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("out", "in_", "rank"), [(513, 64, 4), (1100, 300, 16), (70, 9000, 8), (1, 5, 2), (600, 1, 64)]
)
def test_block_by_block_is_the_whole_matrix_bit_for_bit(dtype, out, in_, rank):
    torch.manual_seed(0)
    w, a, b = torch.randn(out, in_).to(dtype), torch.randn(rank, in_), torch.randn(out, rank)
    whole = (w.float() + (b @ a) * 0.7).to(dtype)
    merging = LowRank.of(b, a, 0.7)

    def read(start, stop):
        return w[start:stop].to(working_dtype(dtype), copy=True)

    def write(start, rows):
        w[start : start + len(rows)] = rows

    merge_blocks([merging], list(blocks(out, in_)), read, write)
    assert torch.equal(w, whole)
