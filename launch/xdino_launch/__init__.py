"""What a person or a cluster starts: the command line and its reports."""
