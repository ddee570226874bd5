"""The tool of the benchmarks: it answers at once, so that only the code around it is measured."""


async def look_up(number: str) -> str:
    """Look an invoice up.

    Args:
        number: the invoice's number
    """
    return f"Invoice {number}: 1,200 EUR, due on May 2."
