"""Commands that make models and their training material."""
