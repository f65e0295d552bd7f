"""Numbers beside their targets."""


def beside(value: float, *targets: float, digits: int = 2, sign: str = "") -> str:
    """Format a number that is shown next to targets, with enough decimals to differ from them.

    Args:
        value: number to format.
        targets: numbers that it must differ from.
        digits: decimals, if they suffice.
        sign: "+" to show the sign of positive numbers too.
    """
    for more in range(digits, 7):
        text = f"{value:{sign}.{more}f}"
        if all(text != f"{target:{sign}.{more}f}" for target in targets):
            return text
    return f"{value:{sign}.{max(digits, 3)}f}"  # they are equal


def at_most(ratio: float, most: float) -> tuple[str, bool]:
    """Format a ratio, and return whether it is at most its target."""
    return f"{beside(ratio, most)}x", ratio <= most
