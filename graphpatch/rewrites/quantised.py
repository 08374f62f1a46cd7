"""Weights that are kept in fewer bits, whoever quantised them: what they stand for, and how another value takes their
place.

Only names of classes are compared, so none of the libraries is imported that the model was not made with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..lang.diagnostics import ApplyError, Diagnostic


def is_quantised(tensor: Any) -> bool:
    """Whether a weight is kept as codes: it has no gradient, and no number of it can be changed alone."""
    return _kind(tensor) is not None or (isinstance(tensor, Tensor) and tensor.dtype in _CODES)


def is_writable(tensor: Any) -> bool:
    """Whether another value can be kept as this weight is: `requantised` knows how."""
    kind = _kind(tensor)
    return kind is not None and kind.write is not None


def dequantised(module: nn.Module, name: str = "weight") -> Tensor:
    """What a module's weight stands for, dense, in the shape that the module computes with; the weight itself where it
    is not quantised. Raises `ApplyError` (GP543) for codes that nothing here can read."""
    weight: Any = module._parameters.get(name)
    if weight is None:
        whole = getattr(module, "dequantize", None)  # HQQ's linears, which keep their codes under another name
        if name == "weight" and callable(whole):
            return cast(Tensor, whole())
        weight = getattr(module, name, None)  # a parametrization computes it, or a hook does
        if not isinstance(weight, Tensor):
            raise _unreadable(module, name)
    kind = _kind(weight)
    if kind is None:
        if weight.dtype in _CODES:
            raise _unreadable(module, name)
        return weight
    return kind.read(weight, module)


def requantised(module: nn.Module, value: Tensor, name: str = "weight") -> nn.Parameter:
    """`value`, of the shape that `dequantised` gives, kept as the module's weight is now: the parameter to put there.

    Raises `ApplyError` (GP544) where that is not known, or the library that made the weight refuses.
    """
    weight = module._parameters.get(name)
    kind = _kind(weight)
    if weight is None or kind is None or kind.write is None:
        raise _unwritable(module, weight)
    try:
        made = kind.write(weight, value.detach().to(weight.device))
    except Exception as error:
        raise _unwritable(module, weight, " ".join(str(error).split())[:200]) from error
    return made if isinstance(made, nn.Parameter) else nn.Parameter(made, requires_grad=False)


def _unreadable(module: nn.Module, name: str) -> ApplyError:
    cls = type(module)
    return ApplyError(
        Diagnostic(
            "GP543",
            f"what the `{name}` of {cls.__name__} stands for is not known",
            text=(f"{cls.__module__}.{cls.__qualname__} keeps it in a form of its own",),
            fixes=("use the base as it was before it was quantised: an adapter fits that too",),
        )
    )


def _unwritable(module: nn.Module, weight: Any, why: str = "") -> ApplyError:
    return ApplyError(
        Diagnostic(
            "GP544",
            f"the weight of {type(module).__name__} cannot be quantised anew ({type(weight).__name__})",
            text=(why,) if why else (),
            fixes=("leave the adapter beside it, or use the base as it was before it was quantised",),
        )
    )


class _Kind(NamedTuple):
    read: Callable[[Any, nn.Module], Tensor]
    write: Callable[[Any, Tensor], Tensor] | None = None
    """The value as the weight's library keeps it, with the weight's own settings."""


_CODES = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2}


def _kind(tensor: Any) -> _Kind | None:
    cls = type(tensor)
    if cls is nn.Parameter or cls is Tensor:
        return None
    if cls.__name__ == "Int8Params" and tensor.dtype != torch.int8:
        return None  # not quantised yet: that happens on its way to the GPU
    if cls.__name__ == "Params4bit" and getattr(tensor, "quant_state", None) is None:
        return None
    return next((_KINDS[c.__name__] for c in cls.__mro__ if c.__name__ in _KINDS), None)


# ── torchao ──


def _int8(weight: Any, value: Tensor) -> Tensor:
    from torchao.quantization.granularity import PerGroup, PerRow, PerTensor

    if weight.act_pre_scale is not None:
        raise ValueError("its activations are scaled beforehand, by what was measured on the weight that it is")
    block, shape = list(weight.block_size), list(weight.shape)
    whole = PerTensor() if block == shape else PerGroup(block[-1])
    made = type(weight).from_hp(
        value.to(weight.dtype),
        PerRow() if block == [1, shape[-1]] else whole,
        act_quant_kwargs=weight.act_quant_kwargs,
        act_quant_scale=weight.act_quant_scale,
        act_quant_zero_point=weight.act_quant_zero_point,
        reduce_range=weight.reduce_range,
    )
    return cast(Tensor, made)


def _intx(weight: Any, value: Tensor) -> Tensor:
    from torchao.quantization import MappingType

    even = not bool(weight.zero_point.any())
    made = type(weight).from_hp(
        value.to(weight.dtype),
        weight.block_size,
        weight.target_dtype,
        mapping_type=MappingType.SYMMETRIC if even else MappingType.ASYMMETRIC,
        activation_quantization=weight.activation_quantization,
    )
    return cast(Tensor, made)


def _torchao_nf4(weight: Any, value: Tensor) -> Tensor:
    return cast(Tensor, type(weight).from_tensor(value.to(weight.dtype), weight.block_size, weight.scaler_block_size))


def _torchao_int4(weight: Any, value: Tensor) -> Tensor:
    return cast(Tensor, type(weight).from_hp(value.to(weight.dtype), list(weight.block_size)))


# ── bitsandbytes ──


def _read_4bit(weight: Any, module: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return cast(Tensor, dequantize_4bit(weight.data, weight.quant_state))


def _write_4bit(weight: Any, value: Tensor) -> Tensor:
    made = type(weight)(
        value.to(weight.quant_state.dtype).cpu(),
        requires_grad=False,
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
    )
    return cast(Tensor, made.to(weight.device))


def _read_8bit(weight: Any, module: nn.Module) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    state = getattr(module, "state", None)
    scales = getattr(state, "SCB", None)
    scales = getattr(weight, "SCB", None) if scales is None else scales
    codes = getattr(state, "CB", None)
    codes = weight.data if codes is None else codes
    return cast(Tensor, int8_vectorwise_dequant(codes, cast(Any, scales).to(codes.device)))


def _write_8bit(weight: Any, value: Tensor) -> Tensor:
    made = type(weight)(value.cpu(), requires_grad=False, has_fp16_weights=weight.has_fp16_weights)
    return cast(Tensor, made.to(weight.device))


_KINDS = {
    "QuantisedTensor": _Kind(lambda w, _: w.dequantize(), lambda w, value: w.again(value)),
    "Int8Tensor": _Kind(lambda w, _: w.dequantize(), _int8),
    "IntxUnpackedToInt8Tensor": _Kind(lambda w, _: w.dequantize(), _intx),
    "Int4Tensor": _Kind(lambda w, _: w.dequantize(), _torchao_int4),
    "NF4Tensor": _Kind(lambda w, _: w.get_original_weight(), _torchao_nf4),
    "TorchAOBaseTensor": _Kind(lambda w, _: w.dequantize()),
    "QTensor": _Kind(lambda w, _: w.dequantize()),  # optimum-quanto
    "Params4bit": _Kind(_read_4bit, _write_4bit),
    "Int8Params": _Kind(_read_8bit, _write_8bit),
}  # fmt: skip
"""By the class of the parameter, or one that it derives from."""
