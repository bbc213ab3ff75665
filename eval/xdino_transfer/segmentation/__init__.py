"""Semantic segmentation with an XCiT (section 4.4): published heads, data, augmentation, scores."""
