"""What `xdino look` and `xdino plan` do besides counting: trials, candidates, tables."""
