"""The peak memory before the run.

    ask            starts the prediction and asks it: all that train.py knows
    predict        the training step on tensors without memory, in a process of its own
    hollow         tensors with a size and no memory
    allocator      what a GPU's allocator adds
    fit            the cheapest options that fit a GPU
"""
