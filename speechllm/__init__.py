"""Speech and text in one language model: audio becomes codes, codes become ids, a mixture of experts continues."""

__version__ = "0.1.0"
