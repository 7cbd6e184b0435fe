"""Text shipped for the demo."""
