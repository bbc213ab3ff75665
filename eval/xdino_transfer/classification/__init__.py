"""Supervised training of classifiers by the published recipes (XCiT after DeiT, arXiv 2012.12877)."""
