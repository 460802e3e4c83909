"""One pre-trained Vision Transformer -> one set of weights -> a network of any size.

Letters used in every module of this package: B images, T tokens, D embedding width, H heads, d head width,
M hidden width of an MLP, L blocks, N proxy images.
"""
