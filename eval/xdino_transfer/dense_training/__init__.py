"""What training a segmenter and a detector have in common: recipe, plan, one step, the job."""
