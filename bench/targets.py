"""Numbers beside their targets."""


def beside(value: float, *targets: float, digits: int = 2, sign: str = "") -> str:
    """Return a number as it is printed beside its targets: with decimals enough not to read like one of them.

    Args:
        value: the number.
        targets: what it is held against.
        digits: decimals where these tell the two apart; else three at least.
        sign: "+" for one before positive numbers too.
    """
    for more in range(digits, 7):
        text = f"{value:{sign}.{more}f}"
        if all(text != f"{target:{sign}.{more}f}" for target in targets):
            return text
    return f"{value:{sign}.{max(digits, 3)}f}"  # they are equal


def at_most(ratio: float, most: float) -> tuple[str, bool]:
    """Return a ratio as it is printed, and whether it meets its target."""
    return f"{beside(ratio, most)}x", ratio <= most
