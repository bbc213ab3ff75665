"""What judges a frozen backbone: k-NN, linear probes, class-attention maps."""
