"""Started by test_extending: a run of two processes, extended; and one planned as long."""

import sys

import torch

from xdino import config, pretraining
from xdino.runtime import distributed
from xdino_launch.commands.pretraining import parse_overrides

folder, *options = sys.argv[1:]
overrides = parse_overrides(options)
short = config.load("debug", overrides)
long = config.load("debug", overrides | {"train.extended": "1"})
distributed.start(torch.device("cpu"))
pretraining.pretrain(short, f"{folder}/run")
pretraining.pretrain(short, f"{folder}/run", extend=1)
pretraining.pretrain(long, f"{folder}/planned")
distributed.stop()
