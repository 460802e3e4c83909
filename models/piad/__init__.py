"""Stage 2, progressive importance-aware dropout (PIAD).

In: a super-network and proxy images. Out: the list of sub-networks, and the one that a training step draws.
"""
