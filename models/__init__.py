"""One pre-trained Vision Transformer -> one set of weights -> a network of any size.

    vit      the network at any width
    wpac     stage 1: weights rewritten so that the first dimensions hold the most
    piad     stage 2: which sub-networks there are, and which one a training step draws
    subnet   stages 3 and 4: a budget, the sub-network within it, its files

Each folder imports only from those above it. Letters used everywhere: B images, T tokens, D embedding width,
H heads, d head width, M hidden width of an MLP, L blocks, N proxy images.
"""
