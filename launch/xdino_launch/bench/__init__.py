"""Side-by-side timings, ours beside ours and beside published code."""
