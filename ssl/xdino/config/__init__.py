"""The configuration of a run: frozen, strict, and the only place where defaults live.

A recipe is a YAML file of sections with keys below them; whatever it leaves out has its default from
`schema`. `parsing` checks a tree of keys, `recipe_files` finds and reads recipes. Texts, in a recipe as
on the command line, are read by the type of their key (`xdino.values`).
"""

from xdino.config.keys import Setting, about, commented, settings
from xdino.config.parsing import differing_keys, parse, spelt, to_tree, to_yaml, unfused
from xdino.config.recipe_files import (
    HEAD,
    KINDS,
    comments,
    file_of,
    head,
    kind_of,
    load,
    recipes,
    recipes_dir,
    sections,
)
from xdino.config.schema import (
    FREE,
    KEYS,
    MAX_PIXELS,
    Config,
    Crops,
    Curriculum,
    Data,
    Evaluate,
    Head,
    Loss,
    Model,
    Optim,
    RunConfig,
    Runtime,
    Teacher,
    Train,
    dotted_keys,
    in_epochs,
)  # fmt: skip

__all__ = [
    "FREE", "HEAD", "KEYS", "KINDS", "MAX_PIXELS", "Config", "Crops", "Curriculum", "Data", "Evaluate",
    "Head", "Loss", "Model", "Optim", "RunConfig", "Runtime", "Setting", "Teacher", "Train", "about",
    "commented", "comments", "differing_keys", "dotted_keys", "file_of", "head", "in_epochs", "kind_of",
    "load", "parse", "recipes", "recipes_dir", "sections", "settings", "spelt", "to_tree", "to_yaml",
    "unfused",
]  # fmt: skip
