"""The commands, a file a subject; `cli.py` puts them together.

A command parses, answers mistakes in one sentence, and hands over to a room. torch and the rest take
seconds to import, so a command imports what it needs when it runs: --help answers at once.
"""
