"""LoRA: a trained low-rank matrix beside a frozen one."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import field_validator, model_validator

from ..tree.tree import Signature, Tensor
from .arguments import Count, Flag, Real, Share, Text
from .calls import refuse_uncalled
from .lora_attention import ATTENTION, FUSED, SEPARATE, attention_shapes, is_separate
from .lora_experts import STACKS, row_of, stack
from .lora_options import (
    DIVIDE,
    ENGINE,
    GROUPED,
    LINEAR,
    OF_THE_WEIGHT,
    PARALLEL,
    PARALLEL_EMBEDDING,
    TIED,
    check_options,
)
from .lora_parts import with_layout
from .lora_shapes import EXACT, Shape, factor_shapes
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
    Of a subclass of `nn.Linear` that has a forward of its own, s B A x is added to what that makes; `patch.merge()`
    tries whether that is still W x + b, and refuses where it is not.

    On `nn.Embedding`, A is rank x vocabulary and B dim x rank: the row of a token x gains s B A[:, x]. There A starts
    at zero and B standard normal, as PEFT has it, so the row of `padding_idx` stays what it is; dropout, on the one-hot
    input that an embedding stands for, drops a token's whole update. `max_norm` and `sparse` are refused.

    On `nn.Conv1d/2d/3d`, A is a convolution like the base (stride, padding, dilation) with rank channels out, B one of
    size 1 from those, so the weight gains s B A, multiplied over the channels. Groups hold for both factors and split
    the rank, which must be a multiple of them; PEFT's A has none, and so cannot be merged. PEFT has nothing for
    `nn.ConvTranspose1d/2d/3d`, where A is a transposed convolution, stored like the weight: in x rank/groups x kernel.

    Stacked experts are parameters, and targeted as such: `experts.gate_up_proj`. A is (experts, rank, in) and B
    (experts, out, rank), as `experts.gate_up_proj_lora_A` and `..._lora_B`, and expert e gains s B[e] A[e]. The product
    is that of the tokens routed to an expert, so no patched stack is ever made; dropout draws for each token at each of
    its experts. Accepted are the experts that Transformers dispatches (Mixtral, Qwen-MoE, DeepSeek, gpt-oss ...),
    whichever of its implementations is set, and those of Llama 4, JetMoE and Step 3.

    `nn.MultiheadAttention` has factors for its fused weight and for the one of its output, as in PEFT
    (`in_proj_lora_A`, `out_proj_lora_A`), and where q, k and v have a weight each, for each (`q_proj_lora_A`). It is
    given weights that have gained s B A, put together in each call, and so there is no dropout.

    With `parts`, a linear that is several in one (q, k and v; gate and up) has factors for those parts alone, each its
    own as in separate linears: `lora_A` is (parts * rank) x in, and `lora_B` holds the parts' rows one after the other,
    in the order of the weight. Which rows are whose is known for fused linears of Transformers, and else said by
    `layout` and `groups`; the plan shows it.

    A module whose weight is tied to another's is refused: an update of a head would be none of the embedding that is
    the same matrix. With `tied`, a rule that targets all uses of a weight gives them one adapter, the same two
    parameters on each: those of an embedding, A rank x vocabulary and B dim x rank, so that a head over the vocabulary
    gains s A^T B^T.

    With `dora`, W + s B A is taken apart into directions and lengths: each row has the trained length `lora_magnitude`
    (out), at first the weight's own, so y = m / |W + s B A| * (W x + s B A x) + b. The norm is a constant to backward,
    and is worked out without the sum. Rows are features out; an embedding's are its dimensions, over the whole
    vocabulary, so that DoRA scales the row of the padding too.

    `init="pissa"` starts from the weight's principal singular vectors, `init="olora"` from its QR decomposition. Both
    mean W - s B0 A0 + s B A, with B0 and A0 what the factors started from. The weight is not touched: B0 and A0 are
    kept (the buffers `lora_B_init` and `lora_A_init`, saved with the adapter) and y = W x + b + s (B A - B0 A0) x, so
    nothing is to be put back, base checkpoints fit, and the whole is a plain LoRA of twice the rank. With
    `init="orthogonal"` both factors are random, and B A = 0. With `init="eva"`, A starts from the principal directions
    of the inputs that `apply(model, rules, batches=...)` lets it see; ranks are not shared out anew, as PEFT can.
    `init="loftq"` is for a weight that is quantised: s B A starts from the principal part of what quantising took from
    it, the best that a low rank can give back, so the model starts nearer to the one before. The weight as it was must
    be at hand, as in `quantize.nf4() then lora(rank=16, init="loftq")` and, in a later rule file, where it was kept.
    That is one step of LoftQ, the default of PEFT; more would change the codes, which then were no longer those that
    the base is quantised to wherever the adapter is loaded.

    Hu et al., LoRA, arXiv:2106.09685, section 4.1. Kalajdzievski, rsLoRA, arXiv:2312.03732, section 3. Liu et al.,
    DoRA, arXiv:2402.09353, section 4. Meng et al., PiSSA, arXiv:2404.02948. Büyükakyüz, OLoRA, arXiv:2406.01775.
    Paischer et al., EVA, arXiv:2410.07170. Li et al., LoftQ, arXiv:2310.08659, algorithm 1 with T = 1. Embeddings and
    convolutions as in PEFT 0.21, peft/tuners/lora/layer.py, but for groups and dropout on embeddings.
    """

    accepts: ClassVar = {
        "torch.nn.modules.linear.Linear": "graphpatch.rewrites.lora:LoraLinear",
        # Linears of quantisation libraries that do not derive from it.
        "hqq.core.quantize.HQQLinear": "graphpatch.rewrites.lora:LoraLinear",
        "gptqmodel.nn_modules.qlinear.BaseQuantLinear": "graphpatch.rewrites.lora:LoraLinear",
        "awq.modules.linear.gemm.WQLinear_GEMM": "graphpatch.rewrites.lora:LoraLinear",
        "awq.modules.linear.gemv.WQLinear_GEMV": "graphpatch.rewrites.lora:LoraLinear",
        "awq.modules.linear.gemv_fast.WQLinear_GEMVFast": "graphpatch.rewrites.lora:LoraLinear",
        "transformers.pytorch_utils.Conv1D": "graphpatch.rewrites.lora_conv1d:LoraConv1D",
        "torch.nn.modules.sparse.Embedding": "graphpatch.rewrites.lora_embedding:LoraEmbedding",
        "torch.nn.modules.conv.Conv1d": "graphpatch.rewrites.lora_convolution:LoraConvolution",
        "torch.nn.modules.conv.Conv2d": "graphpatch.rewrites.lora_convolution:LoraConvolution",
        "torch.nn.modules.conv.Conv3d": "graphpatch.rewrites.lora_convolution:LoraConvolution",
        "torch.nn.modules.conv.ConvTranspose1d": "graphpatch.rewrites.lora_transposed:LoraTransposedConvolution",
        "torch.nn.modules.conv.ConvTranspose2d": "graphpatch.rewrites.lora_transposed:LoraTransposedConvolution",
        "torch.nn.modules.conv.ConvTranspose3d": "graphpatch.rewrites.lora_transposed:LoraTransposedConvolution",
        ATTENTION: FUSED,
        "megatron.core.tensor_parallel.layers.ColumnParallelLinear": "graphpatch.megatron.lora:LoraColumnParallel",
        "megatron.core.tensor_parallel.layers.RowParallelLinear": "graphpatch.megatron.lora:LoraRowParallel",
        "megatron.core.tensor_parallel.layers.VocabParallelEmbedding": PARALLEL_EMBEDDING,
        **{f"megatron.core.extensions.transformer_engine.{name}": row for name, row in (ENGINE | GROUPED).items()},
    }
    accepts_parameters: ClassVar = STACKS
    level: ClassVar[int] = 10
    exact_at_init: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    rank: Count = 8
    """The inner dimension; as in PEFT, 8 where none is given."""
    alpha: Real | None = None
    """The numerator of the scale; where none is given it is the rank, so the scale is 1."""
    dropout: Share = 0.0
    use_rslora: Flag = False
    init: Literal["kaiming", "gaussian", "pissa", "olora", "orthogonal", "eva", "loftq"] = "kaiming"
    """Of A: uniform in +-1/sqrt(in), as `nn.Linear` has it (in: times the kernel's size in a convolution), or normal
    with a deviation of 1/rank; or one of those told of above, for linears. Embeddings have one of their own."""
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    """Of the factors; else the weight's, and float32 where that is half precision or quantised."""
    adapter: str | None = None
    """Sets the adapter apart from others on the same module: its keys end in `_NAME`."""
    dora: Flag = False
    """Whether each row's length is trained apart from its direction."""
    bias: Flag = False
    """Whether B has a bias that is trained (`lora_B_bias`, zero at first)."""
    iterations: Count | None = None
    """Of the randomised decomposition that `init="pissa"` then makes instead of a full one; 16 are plenty."""

    parts: tuple[Text, ...] | None = None
    """Of a linear that is several in one, those that get factors, each its own: `["q", "v"]`. `nn.MultiheadAttention`
    has q, k, v and out."""
    layout: tuple[tuple[Text, Count], ...] | None = None
    """With `parts`: the parts of the linear in their order, each with its rows, `[["q", 64], ["k", 64], ["v", 64]]`."""
    groups: Count | None = None
    """With `layout`: how often that repeats, where the parts take turns, head by head."""
    tied: Flag = False
    """Whether this is one adapter for all uses of a tied weight."""

    @field_validator("adapter")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not value.isidentifier():
            raise ValueError("must be a name of letters, digits and _, since it ends the names of parameters")
        return value

    @model_validator(mode="after")
    def _agrees(self) -> Lora:
        if self.iterations is not None and self.init != "pissa":
            raise ValueError('`iterations` has an effect with init="pissa" alone')
        if self.init in DIVIDE and self.scale <= 0:
            raise ValueError(f'init="{self.init}" divides the weight by the scale, so alpha must be above 0')
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f'init="orthogonal" halves the rank, and {self.rank} is odd')
        if self.bias and self.dora:
            raise ValueError("`bias` and `dora` do not go together: DoRA scales rows of the weight, which has no bias")
        if self.parts is None and (self.layout or self.groups):
            raise ValueError("`layout` and `groups` have an effect with `parts` alone")
        if self.groups is not None and self.layout is None:
            raise ValueError("`groups` says how often a `layout` repeats, and there is none")
        for names in (self.parts, self.layout and [name for name, _ in self.layout]):
            if names is not None and (not names or len(set(names)) < len(names)):
                raise ValueError("`parts` and `layout` name at least one part, each once")
        if self.parts or self.tied:
            name = "parts" if self.parts else "tied"
            plain = ("kaiming", "gaussian") if self.parts else ("kaiming",)
            if self.dora or self.bias or self.init not in plain or (self.parts and self.tied):
                other = "dora" if self.dora else "bias" if self.bias else "init" if self.init not in plain else "tied"
                raise ValueError(f"`{name}` does not go together with `{other}`")
        return self

    @property
    def shares(self) -> tuple[str, ...]:
        return self.keys if self.tied else ()

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    @property
    def keys(self) -> tuple[str, str]:
        """The names of A and B on their module."""
        return self.key("lora_A"), self.key("lora_B")

    def key(self, name: str, parameter: str | None = None) -> str:
        """The name on a module of one of this adapter's tensors; where the target is a parameter, of those for that."""
        return f"{parameter}_{self.key(name)}" if parameter else f"{name}_{self.adapter}" if self.adapter else name

    @property
    def started(self) -> tuple[str, ...]:
        """The names of the buffers that remember what A and B started from, where they must."""
        return (self.key("lora_A_init"), self.key("lora_B_init")) if self.init in OF_THE_WEIGHT else ()

    def slots(self) -> frozenset[str]:
        return frozenset({f"lora:{self.adapter}" if self.adapter else "lora"})

    def named(self, adapter: str | None) -> Op:
        # A name in the rule says more than the one given to all of a file.
        return self if adapter is None or self.adapter is not None else self.model_copy(update={"adapter": adapter})

    def resolved(self, target: Target) -> Op:
        if self.parts is None or target.parameter or self._rewrite(target) not in LINEAR | PARALLEL:
            return self
        return with_layout(self, target)

    def through(self, target: Target, row: str) -> str:
        if target.parameter:
            return row_of(target, row)
        return SEPARATE if row == FUSED and is_separate(target) else row

    def check(self, target: Target) -> None:
        refuse_uncalled(target, "lora")
        mro = target.signature.mro
        if any(c.endswith(".LazyModuleMixin") for c in mro):
            raise Refusal(
                f"{target.signature.cls} does not know its shape yet",
                "run the model once on a batch, so that its lazy modules take their shapes, then patch",
            )
        self._check_ties(target)
        self._refuse_unknown_forward(target.signature)
        check_options(self, target, self._rewrite(target))
        taken = [k for k in self.adds(target) if k in target.signature.parameters or k in target.signature.buffers]
        if taken:
            raise Refusal(
                f"{target.signature.cls} has a tensor called `{taken[0]}` already",
                f'give this one a name: lora(rank={self.rank}, adapter="mine")',
            )

    def _rewrite(self, target: Target) -> str:
        table = self.accepts_parameters if target.parameter else self.accepts
        row = next((table[c] for c in (*target.signature.mro, "*") if c in table), "")
        return self.through(target, row)

    def _refuse_unknown_forward(self, signature: Signature) -> None:
        """The update of a linear is added to whatever a subclass makes of the base. That of an embedding or a
        convolution needs the input as the base sees it, and a subclass may shift its indices, or pad."""
        row = next((c for c in signature.mro if c in self.accepts), "")
        own = next((c for c in signature.mro if not c.startswith("torch.nn.utils.parametrize.")), "")
        # Transformers' word embeddings that multiply their rows say by what.
        scales = "embed_scale" in signature.attributes or "embed_scale" in signature.buffers
        if row in EXACT and own != row and not scales:
            raise Refusal(
                f"{signature.cls} derives from {row.rpartition('.')[2]} and may use its input otherwise "
                f"(positions count from an offset, a convolution pads), so an update from the input could be wrong",
                f'if its forward is that of its base: graphpatch.accept("lora", "{own}", "{self.accepts[row]}")',
            )

    def adds(self, target: Target) -> dict[str, Tensor]:
        held = target.signature.parameters
        weight = target.tensor or next((held[name] for name in _WEIGHTS if name in held), None)
        dtype = self.dtype or (weight.dtype if weight and weight.dtype in ("float64", "float32") else "float32")
        found: dict[str, Tensor] = {}
        if self.tied and "weight" in target.later:
            return found  # they are the other's, which is first
        for of, (a, b) in self._shapes(target).items():
            shapes = {"lora_A": a, "lora_B": b}
            if self.dora:
                shapes["lora_magnitude"] = b[:1]
            if self.bias:
                shapes["lora_B_bias"] = b[:1]
            found |= {self.key(name, of): Tensor(shape, dtype) for name, shape in shapes.items()}
            for name, shape in zip(self.started, (a, b)):
                found[name] = Tensor(shape, dtype, trainable=False, buffer=True)
        return found

    def _shapes(self, target: Target) -> dict[str | None, tuple[Shape, Shape]]:
        """The shapes of A and B, by the parameter they are for where the module has several."""
        if target.parameter is None:
            if ATTENTION in target.signature.mro:
                return attention_shapes(target, self.rank, self.parts)
            a, b = factor_shapes(target.signature, self.rank)
            if self.parts and self.layout:
                rows = sum(size for name, size in self.layout if name in self.parts) * (self.groups or 1)
                a, b = (len(self.parts) * self.rank, *a[1:]), (rows, self.rank)
            if self.tied and self._rewrite(target) in LINEAR:
                a, b = b[::-1], a[::-1]
            return {None: (a, b)}
        of = stack(target)
        a, b = (of.experts, self.rank, of.in_features), (of.experts, of.out_features, self.rank)
        return {target.parameter: (a, b)}

    def after(self, target: Target) -> str:
        return f"LoRA {target.signature.cls}"

    def _check_ties(self, target: Target) -> None:
        if not self.tied:
            _refuse_tied(target)
            return
        if not target.tied.get("weight"):
            raise Refusal(
                "`tied=true` has no effect here: no other module has this weight", "leave it out", code="GP458"
            )
        if target.parameter or self._rewrite(target) not in TIED:
            raise Refusal(f"one adapter for a tied weight is for embeddings and linears, not {target.signature.cls}")


_WEIGHTS = ("weight", "in_proj_weight", "q_proj_weight")
"""What a module calls its weight, or the first of several."""


def _refuse_tied(target: Target) -> None:
    """A tied weight is one matrix with two uses. An update of one use alone would part them: merged into the weight it
    would change the other, and a checkpoint of the merged model could not say so."""
    names = (target.parameter,) if target.parameter else (*_WEIGHTS, "k_proj_weight", "v_proj_weight")
    others = next((target.tied[name] for name in names if name in target.tied), ())
    if others:
        shared = f"`{others[0]}`" + (f" and {len(others) - 1} more" if len(others) > 1 else "")
        uses = " | ".join(f"^{path}" for path in (target.path, *(other.rpartition(".")[0] for other in others)))
        raise Refusal(
            f"its weight is tied: it is {shared} too, and an adapter here would change this use of it alone",
            f"one adapter for all uses: patch {uses} with lora(tied=true)",
            f"or leave it out: except ^{target.path}",
            "or give it a weight of its own before patching: "
            "module.weight = nn.Parameter(module.weight.detach().clone()), and tie_word_embeddings=False in the config",
            code="GP424",
        )
