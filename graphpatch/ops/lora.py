"""LoRA: a trained low-rank matrix beside a frozen one."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import field_validator

from ..tree.tree import Tensor
from .arguments import Count, Flag, Real, Share
from .calls import refuse_uncalled
from .lora_shapes import factor_shapes
from .op import Op, Refusal, Target
from .registry import register


@register("lora")
class Lora(Op):
    """A low-rank update beside a linear layer: y = W x + b + s B A x, with s = alpha / rank.

    A (`lora_A`, rank x in) starts random, B (`lora_B`, out x rank) starts at zero, so the model computes what it did
    until it is trained. With `use_rslora`, s = alpha / sqrt(rank). Dropout acts on the adapter's input alone.
    Beside a base of half precision the factors are float32 (masters for the optimizer), and the sum is computed in the
    dtype of the input; a rank above min(in, out) is allowed, and no more expressive than min(in, out).

    The `Conv1D` of Transformers (GPT-2) is a linear whose weight is stored (in, out); its factors are a linear's.

    A module whose weight is tied to another's is refused: an update of a head would be none of the embedding that is
    the same matrix.

    Hu et al., LoRA, arXiv:2106.09685, section 4.1. Kalajdzievski, rsLoRA, arXiv:2312.03732, section 3.
    """

    accepts: ClassVar = {
        "torch.nn.modules.linear.Linear": "graphpatch.rewrites.lora:LoraLinear",
        "transformers.pytorch_utils.Conv1D": "graphpatch.rewrites.lora_conv1d:LoraConv1D",
    }
    level: ClassVar[int] = 10
    exact_at_init: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    rank: Count = 8
    """The inner dimension; as in PEFT, 8 where none is given."""
    alpha: Real | None = None
    """The numerator of the scale; where none is given it is the rank, so the scale is 1."""
    dropout: Share = 0.0
    use_rslora: Flag = False
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """Of A: uniform in +-1/sqrt(in), as `nn.Linear` has it, or normal with a deviation of 1/rank."""
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    """Of the factors; else the weight's, and float32 where that is half precision or quantised."""
    adapter: str | None = None
    """Sets the adapter apart from others on the same module: its keys end in `_NAME`."""

    @field_validator("adapter")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not value.isidentifier():
            raise ValueError("must be a name of letters, digits and _, since it ends the names of parameters")
        return value

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    @property
    def keys(self) -> tuple[str, str]:
        """The names of A and B on their module."""
        tail = f"_{self.adapter}" if self.adapter else ""
        return f"lora_A{tail}", f"lora_B{tail}"

    def slots(self) -> frozenset[str]:
        return frozenset({f"lora:{self.adapter}" if self.adapter else "lora"})

    def named(self, adapter: str | None) -> Op:
        # A name in the rule says more than the one given to all of a file.
        return self if adapter is None or self.adapter is not None else self.model_copy(update={"adapter": adapter})

    def check(self, target: Target) -> None:
        refuse_uncalled(target, "lora")
        mro = target.signature.mro
        if any(c.endswith(".LazyModuleMixin") for c in mro):
            raise Refusal(
                f"{target.signature.cls} does not know its shape yet",
                "run the model once on a batch, so that its lazy modules take their shapes, then patch",
            )
        _refuse_tied(target)
        factor_shapes(target.signature, self.rank)
        taken = [k for k in self.keys if k in target.signature.parameters or k in target.signature.buffers]
        if taken:
            raise Refusal(
                f"{target.signature.cls} has a tensor called `{taken[0]}` already",
                f'give this one a name: lora(rank={self.rank}, adapter="mine")',
            )

    def adds(self, target: Target) -> dict[str, Tensor]:
        weight = target.signature.parameters.get("weight")
        dtype = self.dtype or (weight.dtype if weight and weight.dtype in ("float64", "float32") else "float32")
        shapes = factor_shapes(target.signature, self.rank)
        return {key: Tensor(shape, dtype) for key, shape in zip(self.keys, shapes)}

    def after(self, target: Target) -> str:
        return f"LoRA {target.signature.cls}"


def _refuse_tied(target: Target) -> None:
    """A tied weight is one matrix with two uses. An update of one use alone would part them: merged into the weight it
    would change the other, and a checkpoint of the merged model could not say so."""
    others = target.tied.get("weight", ())
    if others:
        shared = f"`{others[0]}`" + (f" and {len(others) - 1} more" if len(others) > 1 else "")
        raise Refusal(
            f"its weight is tied: it is {shared} too, and an adapter here would change this use of it alone",
            f"leave it out: except ^{target.path}",
            "or give it a weight of its own before patching: "
            "module.weight = nn.Parameter(module.weight.detach().clone()), and tie_word_embeddings=False in the config",
            code="GP424",
        )
