"""Training a detector: recipe, data, plan, the job, and what judges it."""
