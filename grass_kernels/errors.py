"""Exceptions of `grass_kernels`."""


class KernelArgumentError(ValueError):
    """Invalid arguments. Raised before anything is launched or changed.

    The message names the argument, the position in a list, the value that was passed, and the remedy.
    """
