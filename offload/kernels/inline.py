"""Functions that are compiled as parts of the kernels that call them.

A function that numba compiles on its own is optimised and made machine code, and then, in each kernel that
calls it, once more. Numba's inline="always" avoids that, but copies every variable of the caller for every
block of the callee: building a large kernel then takes seconds. A function of this kind is typed by itself,
and joins the kernel's module before that is optimised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.core import cgutils, compiler
from numba.extending import intrinsic


def inline_for(function_for: Callable[..., Any], literals: int = 0) -> Any:
    """Return a function for kernels, call(*numbers, *args), that runs function(*args) and returns nothing.

    Args:
        function_for: Returns the function, one compiled by numba, for as many numbers as `literals`, which
            kernels capture or name as constants.
        literals: How many leading numbers there are.
    """

    @intrinsic(prefer_literal=True)
    def call(_typing: Any, *args: Any) -> Any:
        function = function_for(*(kind.literal_value for kind in args[:literals]))
        kinds = tuple(map(types.unliteral, args[literals:]))

        def build(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            given = cgutils.unpack_tuple(builder, values[0])[literals:]
            status, _ = call_compiled(context, builder, compile_inline(context, function, kinds), given)
            with cgutils.if_unlikely(builder, status.is_error):
                context.call_conv.return_status_propagate(builder, status)
            return context.get_dummy_value()

        return types.void(types.BaseTuple.from_types(args)), build

    return call


def inline(function: Any) -> Any:
    """Return a function for kernels, as `inline_for` does, where it is always the same one."""
    return inline_for(lambda: function)


def compile_inline(context: Any, dispatcher: Any, kinds: Any) -> Any:
    """Compile a dispatcher's function for these types, as a part of the kernel that is being compiled."""
    flags = compiler.Flags()
    dispatcher.targetdescr.options.parse_as_flags(flags, dispatcher.targetoptions)
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    library, typing = context.active_code_library, dispatcher.targetdescr.typing_context
    compiled = compiler.compile_extra(
        typing, context, dispatcher.py_func, kinds, types.none, flags, {}, library=library
    )
    library.get_function(compiled.fndesc.llvm_func_name).linkage = "linkonce_odr"  # gone once it is inlined
    return compiled


def call_compiled(context: Any, builder: Any, compiled: Any, values: Any) -> Any:
    """Emit a call of a compiled function and return (status, result)."""
    function = context.declare_function(builder.module, compiled.fndesc)
    result, kinds = compiled.signature.return_type, compiled.signature.args
    return context.call_conv.call_function(builder, function, result, kinds, values)
