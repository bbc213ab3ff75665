"""What everything stands on: processes, devices, files that are written whole."""
