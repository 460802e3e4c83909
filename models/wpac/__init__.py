"""Stage 1, weighted PCA for attention contraction (WPAC), and what replaces training after it.

In: a super-network and proxy images. Out: the same function with sorted dimensions; what compensation needs.
Here: token importance (statistics.py), weighted covariances (moments.py) and the paper's basis (WPAC); our bases
(bases.py, rewrite.py); compensation; calibration.
"""
