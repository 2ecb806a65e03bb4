"""Adapters from backends to what a comparison calls: `Subject` for any, and one for each kind that offers more."""

from __future__ import annotations

from functools import singledispatch

from kvgen.backends.native import NativeBackend
from kvgen.backends.python import PythonBackend
from kvgen.backends.xtransformers import XTransformersBackend
from kvgen.comparison.subjects.native import NativeSubject
from kvgen.comparison.subjects.python import PythonSubject
from kvgen.comparison.subjects.subject import Subject
from kvgen.comparison.subjects.xtransformers import XTransformersSubject
from kvgen.contract import Backend

__all__ = ["Subject", "subject_of"]


@singledispatch
def subject_of(backend: Backend) -> Subject:
    """The adapter for a kind of backend."""
    return Subject(backend)


subject_of.register(NativeBackend, NativeSubject)
subject_of.register(PythonBackend, PythonSubject)
subject_of.register(XTransformersBackend, XTransformersSubject)
