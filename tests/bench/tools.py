"""The tool of the benchmarks: it answers at once, so that what is measured is everything around it."""


async def look_up(number: str) -> str:
    """Look an invoice up.

    Args:
        number: the invoice's number
    """
    return f"Invoice {number}: 1,200 EUR, due on May 2."
