"""How amounts are written for people."""


def shown_time(seconds: float) -> str:
    """Seconds, minutes or hours, whichever tells something: "42.0 s", "12.3 min", "97.2 h"."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def large_unit(count: float) -> tuple[str, float]:
    """The word for millions or billions, whichever tells something, and how many it is."""
    return ("billion", 1e9) if count >= 1e9 else ("million", 1e6)


def shown_count(count: float) -> str:
    """ "12.75 billion", "3.60 million"."""
    word, size = large_unit(count)
    return f"{count / size:.2f} {word}"
