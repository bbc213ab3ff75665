"""Pretraining of image backbones without labels: XCiT (arXiv 2106.09681) by DINO (arXiv 2104.14294)."""

__version__ = "0.2.0"
