"""What pretrained weights are worth when they learn on: classification, and the data sets of transfer."""
