"""The published evaluations beyond k-NN and probes: retrieval, copy detection, video segmentation."""
