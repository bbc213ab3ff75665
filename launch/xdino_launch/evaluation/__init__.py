"""What the commands that judge and draw share."""
