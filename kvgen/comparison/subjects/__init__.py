"""Adapters that give backends the calls a comparison needs: `Subject` for all, subclasses for those that offer more."""

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
    """Wrap a backend in the adapter for its kind."""
    return Subject(backend)


subject_of.register(NativeBackend, NativeSubject)
subject_of.register(PythonBackend, PythonSubject)
subject_of.register(XTransformersBackend, XTransformersSubject)
