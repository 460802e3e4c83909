"""The network at any width: timm's own Vision Transformer, of which any prefix can take part.

In: a timm model and the kept widths. Out: the same modules, computing the sub-network; its costs.
Here: the slice and the scale of narrower attention (supernet.py); the cost convention (paper, table of results).
"""
