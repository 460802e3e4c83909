"""Stage 2, progressive importance-aware dropout (PIAD).

In: a super-network and proxy images. Out: the list of sub-networks, and the one that a training step draws.
Here: sensitivity, importance of a unit, the order of a branch (importance.py), growth, sampling rule and draw
(dropout.py), all of the paper's PIAD; distillation.
"""
