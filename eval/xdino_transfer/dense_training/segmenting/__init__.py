"""`xdino segment`: the recipe, its plan, the job that the loop runs, and what judges it."""
