"""The structs and functions of cuda/c_api.h for ctypes, field for field."""

import ctypes
from collections.abc import Callable
from ctypes import c_char_p, c_double, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = range(4)
DTYPES = {"float32": FLOAT32, "float64": FLOAT64, "bfloat16": BFLOAT16, "float16": FLOAT16}


def _fields(*groups: tuple[Any, str]) -> list[tuple[str, Any]]:
    return [(name, kind) for kind, names in groups for name in names.split()]


class SingleOutput(ctypes.Structure):
    """ContinualTransformersSingleOutput."""

    _fields_ = _fields(
        (c_int32, "compute_dtype cache_dtype"),
        (c_void_p, "query key value key_mask key_cache value_cache key_mask_cache"),
        (c_void_p, "position streams attention_mask"),
        (c_int64, "mask_rows mask_heads mask_steps"),
        (c_void_p, "output scores window_key window_value window_key_mask"),
        (c_int64, "num_held num_streams num_steps num_heads window key_dim value_dim"),
        (c_double, "scale"),
        (c_int32, "update_state advance_position overlap"),
        (c_int64, "window_parts"),
        (c_void_p, "parts steps_taken query_mask arrivals"),
    )


class CoSiMhaStep(ctypes.Structure):
    """ContinualTransformersCoSiMhaStep."""

    _fields_ = _fields(
        (SingleOutput, "attention"),
        (c_int32, "weights_dtype"),
        (c_void_p, "query_kernel key_kernel value_kernel gate_kernel output_kernel"),
        (c_void_p, "query_bias key_bias value_bias gate_bias output_bias"),
        (c_int64, "query_features key_features value_features output_features"),
        (c_void_p, "result"),
        (c_int64, "delay"),
        (c_void_p, "query_ring query_mask_ring gate_ring"),
        (c_int32, "multiprocessors"),
        (c_void_p, "scratch"),
    )


class CoSiEncoderStep(ctypes.Structure):
    """ContinualTransformersCoSiEncoderStep."""

    _fields_ = _fields(
        (CoSiMhaStep, "attention"),
        (c_void_p, "attention_norm_scale attention_norm_offset"),
        (c_void_p, "output_norm_scale output_norm_offset"),
        (c_double, "epsilon"),
        (c_void_p, "hidden_kernel hidden_bias output_kernel output_bias"),
        (c_int64, "hidden_features"),
        (c_int32, "activation norm_first"),
        (c_void_p, "result scratch"),
    )


class Retroactive(ctypes.Structure):
    """ContinualTransformersRetroactive."""

    _fields_ = _fields(
        (c_int32, "compute_dtype"),
        (c_void_p, "query key value key_mask query_cache key_cache value_cache key_mask_cache"),
        (c_void_p, "softmax weighted_sum made_with position streams output"),
        (c_int64, "num_held num_streams num_steps num_heads window key_dim value_dim"),
        (c_double, "scale"),
        (c_int32, "update_state advance_position recompute"),
        (c_void_p, "steps_taken"),
    )


STRUCTS = {
    "ContinualTransformersSingleOutput": SingleOutput,
    "ContinualTransformersCoSiMhaStep": CoSiMhaStep,
    "ContinualTransformersCoSiEncoderStep": CoSiEncoderStep,
    "ContinualTransformersRetroactive": Retroactive,
}
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "single_output": (c_char_p, [ctypes.POINTER(SingleOutput), c_void_p]),
    "single_output_parts": (c_int64, [ctypes.POINTER(SingleOutput)]),
    "single_output_arrivals": (c_int64, [ctypes.POINTER(SingleOutput)]),
    "plan_window_parts": (c_int64, [c_int64, c_int64, c_int32]),
    "co_si_mha_step": (c_char_p, [ctypes.POINTER(CoSiMhaStep), c_void_p]),
    "co_si_mha_step_scratch_bytes": (c_int64, [ctypes.POINTER(CoSiMhaStep)]),
    "co_si_mha_step_arrivals": (c_int64, [ctypes.POINTER(CoSiMhaStep)]),
    "co_si_encoder_step": (c_char_p, [ctypes.POINTER(CoSiEncoderStep), c_void_p]),
    "co_si_encoder_step_scratch_bytes": (c_int64, [ctypes.POINTER(CoSiEncoderStep)]),
    "retroactive": (c_char_p, [ctypes.POINTER(Retroactive), c_void_p]),
    "nothing": (c_char_p, [c_void_p]),
}


class Refused(Exception):
    """The message of a launcher that refused a call."""


class CudaLibrary:
    """The functions of c_api.h, without their prefix. An error message raises Refused."""

    def __init__(self, path: str | Path) -> None:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(library, f"continual_transformers_cuda_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, _raising(function) if result is c_char_p else function)
        # Only the emulator has this function. It sets the order in which threads and blocks run.
        self.set_order = getattr(library, "cuda_emulator_set_order", None)


def _raising(function: Callable[..., Any]) -> Callable[..., None]:
    def call(*arguments: Any) -> None:
        sentence = function(*arguments)
        if sentence is not None:
            raise Refused(sentence.decode())

    return call
