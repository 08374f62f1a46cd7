"""The `.tree` text form: readable, diffable, read back exactly.

    graphpatch tree 1
    source "meta"

    classes
      Linear = torch.nn.modules.linear.Linear < torch.nn.modules.module.Module
      ...

    modules
      ^: LlamaForCausalLM vocab_size=128256; config 0
        model: LlamaModel padding_idx=null vocab_size=128256; config 0
          embed_tokens: Embedding num_embeddings=128256 embedding_dim=4096; param weight bfloat16[128256,4096]
          layers: ModuleList
            [0:32]: LlamaDecoderLayer hidden_size=4096
              self_attn: LlamaAttention layer_idx=@ head_dim=128
                ...
          rotary_emb: LlamaRotaryEmbedding; buffer inv_freq float32[64]
        lm_head: Linear in_features=4096 out_features=128256 bias=null; param weight bfloat16[128256,4096]
          weight = ^model.embed_tokens.weight

    config 0
      hidden_size = 4096
      ...

    end 423 modules

Siblings with integer names and equal subtrees stand in one line, `[0:32]`. `layer_idx=@` is the index of the nearest
such line above, `@1` that of the one above it, `@+1` one more. `act -> ^model.act` is a further place of a module,
`weight = ^model.embed_tokens.weight` a tied parameter; `..act` is found from one module up, `.act` from this one.
The last line counts the modules, so a file that was cut is known.
"""

from __future__ import annotations

import os

from ..lang.diagnostics import Diagnostic, Error
from .text_read import parse
from .text_write import render
from .tree import Tree

__all__ = ["parse", "read", "render", "write"]


def read(path: str) -> Tree:
    """A tree from a file. Raises `Error` GP430 where it cannot be read, GP431 to GP435 where it is no tree."""
    try:
        with open(path, encoding="utf-8-sig", newline=None) as file:
            text = file.read()
    except OSError as error:
        raise Error(Diagnostic("GP430", f"{path} cannot be read: {error.strerror or error}")) from None
    except ValueError:
        raise Error(Diagnostic("GP431", f"{path} is not a .tree file: it is not UTF-8 text")) from None
    return parse(text, os.fspath(path))


def write(tree: Tree, path: str) -> None:
    """Write the text form. Raises `Error` GP430 where the file cannot be written."""
    try:
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(render(tree))
    except OSError as error:
        raise Error(Diagnostic("GP430", f"{path} cannot be written: {error.strerror or error}")) from None
