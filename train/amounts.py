"""How amounts are written for people."""


def shown_time(seconds: float) -> str:
    """Seconds, minutes or hours, whichever tells something: "42.0 s", "12.3 min", "97.2 h"."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
