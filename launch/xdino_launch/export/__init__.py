"""Backbones in other people's formats."""
