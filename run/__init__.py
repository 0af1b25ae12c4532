"""What surrounds the training loop of train.py.

    options        every option, and what is refused
    plan           which examples each step takes
    prepare        data, model and optimizer before the first step
    watch          which steps are measured: the peak of a run
    evaluate       the held-out loss
    comparison     what compare.py measures
    intervals      how sure a difference is
    hooks          a loss of your own, and what else a Python program may replace
    interrupt      Ctrl-C lets the step finish
    state          saving and resuming
    record         the files in --out, and what a run prints
    trackers       TensorBoard and wandb
    card           the model card of what it exports
"""
