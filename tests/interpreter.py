"""Triton's interpreter without what it does over and over: the same results in less than half the time."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy
from triton.runtime import interpreter


def hasten() -> None:
    """Let the interpreter look up its own functions once, and take integers for what they are.

    Whenever one kernel function calls another, it searches all of ``triton.language`` for functions to replace, though
    it has replaced them at the first call. And it computes each integer operation again in 64 bits to see whether it
    overflowed, which ours do not at the sizes of tests, but for the hashes of dropout, where it is meant.
    """
    prepared: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(id(self.fn.__globals__))
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    of_scalar = functools.cache(interpreter._get_np_dtype)

    def numpy_dtype(dtype: Any) -> Any:
        scalar = dtype.element_ty if dtype.is_block() else dtype
        return numpy.dtype(numpy.uint64) if scalar.is_ptr() else of_scalar(scalar)

    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = numpy_dtype
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
