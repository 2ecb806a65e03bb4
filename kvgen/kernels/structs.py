"""The structs of structs.h, for ctypes."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_uint8, c_void_p
from enum import IntEnum
from typing import Any

STATE_PARTS = 2
"""Tensors of a recurrent mixer's state, at most."""


class OpKind(IntEnum):
    NORM = 0
    LINEAR = 1
    ROTATE = 2
    ATTEND = 3
    ACTIVATE = 4
    ADD = 5
    ROUTE = 6
    COMBINE = 7
    CONVOLVE = 8
    SCAN = 9
    DELTA = 10


def _fields(names: str, type_: Any) -> list[tuple[str, Any]]:
    return [(name, type_) for name in names.split()]


class Weight(ctypes.Structure):
    _fields_ = (
        *_fields("kind rows cols group wide", c_int32),
        *_fields("codes scales mins", c_void_p),
        ("values", c_uint8 * 16),
    )


class Router(ctypes.Structure):
    _fields_ = (
        *_fields("experts active scores normalize groups active_groups group_top", c_int32),
        *_fields("smallest_sum added_to_sum scale", c_float),
        ("selection", c_void_p),
    )


class Recurrence(ctypes.Structure):
    _fields_ = (
        *_fields("heads value_dim key_heads key_dim", c_int32),
        *_fields("dt_min dt_max", c_float),
        *_fields("dt A D", c_void_p),
    )


class Op(ctypes.Structure):
    _fields_ = (
        *_fields("kind src dst other third mode width heads kv_heads flags layer column", c_int32),
        *_fields("eps scale softcap slope", c_float),
        ("weight", POINTER(Weight)),
        *_fields("vector bias", c_void_p),
        ("vector_size", c_int64),
        ("router", POINTER(Router)),
        ("recurrence", POINTER(Recurrence)),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        *_fields("keys values", c_void_p),
        *_fields("key_head value_head first window", c_int64),
        ("stored", c_int32),
    )


class Sequence(ctypes.Structure):
    _fields_ = (
        ("layers", POINTER(Layer)),
        ("states", POINTER(c_void_p)),
        ("ends", POINTER(c_int32)),
        ("past", c_int64),
        *_fields("row tokens pieces", c_int32),
    )


class Table(ctypes.Structure):
    _fields_ = (*_fields("cos sin", c_void_p), ("rotated", c_int32))


class Run(ctypes.Structure):
    _fields_ = (
        ("ops", POINTER(Op)),
        ("slots", POINTER(c_void_p)),
        ("widths", POINTER(c_int32)),
        ("sequences", POINTER(Sequence)),
        ("tables", POINTER(Table)),
        *_fields("count rows sequence_count activation_bits", c_int32),
    )
