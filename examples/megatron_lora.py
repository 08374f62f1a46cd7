"""LoRA on a megatron-core GPTModel at tensor parallel size 2, under Lightning, in NeMo's words.

    python examples/megatron_lora.py [--steps 20]

Starts its second process itself. Without a GPU it runs on the CPU.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

import graphpatch.megatron.cpu
from graphpatch.lightning import LoRA, MegatronStrategy

VOCABULARY, LENGTH = 128, 32


def gpt() -> nn.Module:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=4,
        hidden_size=128,
        num_attention_heads=8,
        num_query_groups=4,
        ffn_hidden_size=256,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=2,
    )
    return GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, LENGTH, position_embedding_type="rope")


class Model(pl.LightningModule):
    def __init__(self, model_transform: Any):
        super().__init__()
        self.model_transform = model_transform
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = gpt()

    def forward_step(self, model: nn.Module, batch: Any) -> Any:
        (ids,) = batch
        positions = torch.arange(LENGTH, device=ids.device).expand(len(ids), LENGTH)
        output = model(ids[:, :-1], positions, None, labels=ids[:, 1:])
        return output, torch.mean

    def training_step(self, batch: Any, index: int) -> Any:
        strategy: Any = self.trainer.strategy
        loss = strategy.run(batch, self.forward_step)
        self.log("loss", loss, prog_bar=True)
        if self.trainer.is_global_zero and index % 5 == 0:
            print(
                f"step {self.trainer.global_step:3d}   loss {float(loss):.3f}   gradient {strategy.gradient_norm:.3f}"
            )
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)


def data(steps: int) -> Any:
    """Sequences that count up, from anywhere, by one, two or three."""
    draw = torch.Generator().manual_seed(0)
    begin, by = (torch.randint(low, high, (16 * steps, 1), generator=draw) for low, high in ((0, VOCABULARY), (1, 4)))
    ids = (begin + by * torch.arange(LENGTH + 1)) % VOCABULARY
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    if not torch.cuda.is_available():
        graphpatch.megatron.cpu.enable()
    torch.manual_seed(0)

    lora = LoRA(target_modules=["linear_qkv", "linear_proj"], dim=32, dropout=0.0)
    model = Model(model_transform=lora)
    trainer = pl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=2,
        strategy=MegatronStrategy(tensor_model_parallel_size=2, num_microbatches=2),
        callbacks=[lora],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data(steps))
    if trainer.is_global_zero:
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        print(f"{len(trained)} tensors trained, {trained[0]} first; loss {float(trainer.callback_metrics['loss']):.3f}")


if __name__ == "__main__":
    main()
