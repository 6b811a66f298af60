"""TensorRT 10 and 11 and TensorRT-RTX: one code path, which asks the installed library what it has.

The library's module is imported where it is used. Its names are visible to the type checker only; at run time every
function gets the module from ``Bindings``. What not every version has stands behind ``hasattr``.
"""
