"""Detection with an XCiT: boxes and masks of objects by Mask R-CNN, as published (section 4.4)."""
