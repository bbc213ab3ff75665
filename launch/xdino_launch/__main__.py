"""`python -m xdino_launch`, for launchers that start a module: torchrun -m xdino_launch pretrain ..."""

from xdino_launch.cli import main

main()
