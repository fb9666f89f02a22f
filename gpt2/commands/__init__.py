"""The verbs, a file each: the options as a dataclass, and `main`, which does the work.

Every option's help is the docstring below its field; the options of a training run are the config's own.
"""
