"""One unit: its memory, its views, when it is whole, and what becomes of its gradient."""
