"""Stage 1, weighted PCA for attention contraction (WPAC), and what replaces training after it.

In: a super-network and proxy images. Out: the same function with sorted dimensions; what compensation needs.
Here: token importance and weighted covariances (paper, WPAC); the balanced bases; compensation; calibration.
"""
