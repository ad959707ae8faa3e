"""What keeps a run safe: that it works, and what it costs."""
