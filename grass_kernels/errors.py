"""What the kernels refuse."""


class KernelArgumentError(ValueError):
    """Arguments no kernel can take. Raised before anything is launched or changed.

    The message names the list and the position in it, what was found there, and the way out.
    """
