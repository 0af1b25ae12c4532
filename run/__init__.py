"""What surrounds the training loop of train.py.

    options        every option, and what is refused
    prepare        data, model and optimizer before the first step
    watch          which steps are measured: the peak of a run
    evaluate       the held-out loss
    interrupt      Ctrl-C lets the step finish
    state          saving and resuming
    record         the files in --out, and what a run prints
    card           the model card of what it exports
"""
