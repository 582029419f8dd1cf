"""A sample application whose migrations bring pgchannels in."""
