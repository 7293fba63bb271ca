"""The passes of a step, one a file; ``sharpness.py`` puts them in their order.

A pass takes the ``Step`` and what the passes before it gave, and ``Between`` if it replays one of them.
"""
